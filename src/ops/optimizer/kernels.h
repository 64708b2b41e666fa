// The loops of the optimizer over one stretch of one tensor.
#pragma once

#include <cstdint>
#include <span>

#include "krait/core/context.h"
#include "krait/core/dtype.h"
#include "krait/ops/optimizer.h"

namespace krait::optimizer_detail {

// Of one step, the bias corrections folded in: p = p decay - rate m / (sqrt(v) correction + eps).
struct AdamWStep {
  float beta1;
  float beta2;
  float rate;        // lr / (1 - beta1^step)
  float correction;  // 1 / sqrt(1 - beta2^step)
  float eps;
  float decay;  // 1 - lr weight_decay
  float scale;  // of the gradient
};

void adamw(const AdamWStep& step, const float* gradient, float* parameter, float* m, float* v,
           std::int64_t count);
void average(float decay, const float* parameter, float* average, std::int64_t count);
// In f64, over lanes in a fixed order.
double sum_of_squares(const float* x, std::int64_t count);

// On a GPU, all tensors in one launch each. `decay` is for tensors that have it, in place of step.decay.
void cuda_adamw(Context& ctx, const AdamWStep& step, float decay, std::span<const AdamWTensor> tensors);
void cuda_update_average(Context& ctx, float decay, std::span<const AveragedTensor> tensors);
// Waits for the sum.
double cuda_sum_of_squares(Context& ctx, std::span<const Tensor> tensors);

}  // namespace krait::optimizer_detail
