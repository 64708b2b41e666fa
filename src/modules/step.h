// Products of a step together with the norm in front of them.
#pragma once

#include "krait/modules/mixer.h"
#include "krait/ops/projection.h"

namespace krait {

// The part of norm that a projection computes in front of its product.
inline ProjectionInput input_of(const NormLayer& norm) {
  return {.norm = norm.rms ? ProjectionNorm::rms : ProjectionNorm::layer,
          .weight = norm.weight,
          .bias = norm.bias,
          .eps = norm.eps};
}

// layer(input), with `conv` over some of the columns; the residual of the input moves on.
inline ProjectionResult project(Context& ctx, const StepInput& input, const LinearLayer& layer,
                                const ProjectionConv& conv = {}) {
  ProjectionArgs args{.x = input.hidden, .weight = layer.weight, .bias = layer.bias, .conv = conv};
  if (input.norm != nullptr) {
    args.input = input_of(*input.norm);
    args.input.residual = *input.residual;
    args.input.return_residual = true;
  }
  ProjectionResult result = projection(ctx, args);
  if (input.norm != nullptr) *input.residual = result.residual;
  return result;
}

// The same convolution as short_conv() of a step, over the columns from `first` on.
inline ProjectionConv step_conv(const ConvLayer& conv, const Batch& batch, int layer, std::int64_t first) {
  return {.conv_state = batch.pool().conv(layer),
          .weight = conv.weight.squeeze(1),
          .bias = conv.bias,
          .conv_state_indices = batch.state_indices(),
          .first = first,
          .activation = Activation::silu};
}

}  // namespace krait
