// dropout: each element is kept with probability 1 - p and then scaled by 1 / (1 - p) (Srivastava et al.
// 2014).
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

struct DropoutArgs {
  Tensor x;                  // any shape and strides; f32, bf16, f16 or f64
  double probability = 0.0;  // in [0, 1)
  std::uint64_t seed = 0;    // which elements are dropped depends on seed, stream, offset and the element's
  std::uint64_t stream = 0;  // place in row-major order alone
  std::uint64_t offset = 0;  // of the first element
  Tensor out;                // x's shape, optional destination, may be x itself
};

// Bits are those of Philox4x32-10 (krait/core/random.h), 16 for each element, so that p is rounded to a
// multiple of 2^-16 and the kept are scaled by what makes their mean exact. The same call on a gradient is
// the backward.
Tensor dropout(Context& ctx, const DropoutArgs& args);

}  // namespace krait
