// What a fuzz target does with a parsed tensor.
#pragma once

#include <cstdint>

#include "krait/core/tensor.h"

namespace krait::fuzz {

// Reads every element, so that a sanitizer sees a tensor that reaches outside of its file. Tensors
// that repeat elements (stride 0) may be larger than any memory and are left at their corners.
inline void touch(const Tensor& tensor) {
  constexpr std::int64_t kMany = 1 << 20;
  if (tensor.numel() <= kMany) {
    (void)tensor.clone();
    return;
  }
  Tensor corner = tensor;
  for (int dim = 0; dim < tensor.ndim(); ++dim)
    corner = corner.slice(dim, corner.size(dim) - 1, corner.size(dim));
  (void)corner.clone();
}

}  // namespace krait::fuzz
