// The paths of embedding. Those of the CPU take ids that embedding.cc has found to be in range.
#pragma once

#include <cstdint>
#include <span>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait::embedding_detail {

// out[i] = weight[ids[i]], (ids.size(), d), any dtypes and strides.
void reference(const Tensor& weight, std::span<const std::int64_t> ids, const Tensor& out);

// The same for f32, bf16 and f16 whose rows have no gaps: stride(1) is 1 in weight and out.
void copy_rows(Context& ctx, const Tensor& weight, std::span<const std::int64_t> ids, const Tensor& out);

// On a GPU, where ids are not looked at before: outside of the table they give zeros, and add nothing. ids
// are contiguous, out and dout (ids, d).
void gather_cuda(Context& ctx, const Tensor& weight, const Tensor& ids, const Tensor& out);
void backward_cuda(Context& ctx, const Tensor& ids, const Tensor& dout, const Tensor& dweight);

}  // namespace krait::embedding_detail
