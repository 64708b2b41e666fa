// AdamW (Loshchilov and Hutter 2019, algorithm 2), the norm that clipping needs, and the moving average of
// weights; each one loop over all parameters at once, and on a GPU one launch (a table of the tensors is sent
// there at the first call, and again when they are others).
#pragma once

#include <cstdint>
#include <span>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

// One parameter with its optimizer state; all contiguous and of one shape.
struct AdamWTensor {
  Tensor parameter;  // f32: the master weights
  Tensor gradient;   // f32
  Tensor m;          // f32, first moment; zero before the first step
  Tensor v;          // f32, second moment; likewise
  Tensor compute;    // optional bf16 or f16: receives the new parameter, rounded
  bool decay = false;
};

struct AdamWArgs {
  std::span<const AdamWTensor> tensors;
  std::int64_t step = 1;  // from 1: of the bias correction
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.0;    // of tensors with `decay`: p -= lr * weight_decay * p, before the update
  double gradient_scale = 1.0;  // gradients are multiplied by it first (clipping)
};

//   m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   p = p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
void adamw(Context& ctx, const AdamWArgs& args);

// sqrt of the sum of squares over all tensors (f32), summed in f64 in an order that does not depend on the
// number of threads. Not finite where any element is not. On a GPU the call waits for the sum.
double global_norm(Context& ctx, std::span<const Tensor> tensors);

// average = decay average + (1 - decay) parameter, for pairs of f32 tensors of one shape, contiguous.
struct AveragedTensor {
  Tensor average;
  Tensor parameter;
};
void update_average(Context& ctx, std::span<const AveragedTensor> tensors, double decay);

}  // namespace krait
