// How fresh parameters are drawn.
#pragma once

#include "krait/core/random.h"
#include "krait/core/tensor.h"
#include "krait/modules/parameter.h"

namespace krait {

// Uniform in [low, high), f32, contiguous.
Tensor uniform(Rng& rng, const Dims& shape, double low, double high);
Tensor constant(const Dims& shape, double value);
// Weights uniform in +-1/sqrt(fan_in), biases 0.
void initialize(LinearLayer& layer, Rng& rng);
// Weights and biases uniform in +-1/sqrt(d_conv), the fan-in of a depthwise convolution.
void initialize(ConvLayer& layer, Rng& rng);
void initialize(NormLayer& layer);
// softplus^-1 of step sizes drawn log-uniformly from [dt_min, dt_max], at least floor.
Tensor initial_dt_bias(Rng& rng, std::int64_t count, double dt_min, double dt_max, double floor);

}  // namespace krait
