// The short convolution of a mixer over the packed tokens of a batch, on top of the pool's windows.
#pragma once

#include "krait/modules/batch.h"
#include "krait/modules/parameter.h"
#include "krait/ops/causal_conv1d.h"

namespace krait {

// x (T, channels) -> (T, channels); advances the windows of `layer`.
Tensor short_conv(Context& ctx, const ConvLayer& conv, const Tensor& x, Activation activation,
                  const Batch& batch, int layer);

}  // namespace krait
