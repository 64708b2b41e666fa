// Copies between any two tensors of which at least one is on a GPU.
#pragma once

#include "core/cuda/gpu.h"

namespace krait::cuda {

// Element by element with conversion, any strides. A copy from the host has read its source when this
// returns, one to the host has arrived.
void copy_elements(cudaStream_t stream, const Tensor& from, const Tensor& to);
void fill_elements(cudaStream_t stream, const Tensor& t, double value);

}  // namespace krait::cuda
