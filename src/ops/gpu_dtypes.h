// What element types an operator takes on a GPU.
#pragma once

#include <initializer_list>
#include <string_view>

#include "krait/core/context.h"
#include "krait/core/error.h"

namespace krait {

// f64 stays on the CPU.
inline void require_gpu_floats(std::string_view op, std::initializer_list<NamedTensor> tensors) {
  for (const auto& [name, tensor] : tensors)
    require(!tensor || (is_float(tensor.dtype()) && tensor.dtype() != DType::f64), "[", op, "] ", name,
            " has dtype ", tensor.dtype(), ", expected f32, bf16 or f16 on a GPU");
}

}  // namespace krait
