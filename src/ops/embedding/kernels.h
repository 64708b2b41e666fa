// The paths of embedding. Both take ids that embedding.cc has found to be in range.
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

}  // namespace krait::embedding_detail
