// The loops of the optimizer over one stretch of one tensor.
#pragma once

#include <cstdint>

#include "krait/core/dtype.h"

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

}  // namespace krait::optimizer_detail
