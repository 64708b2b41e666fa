#include "modules/initialize.h"

#include <algorithm>
#include <cmath>

namespace krait {

Tensor uniform(Rng& rng, const Dims& shape, double low, double high) {
  Tensor t = Tensor::empty(shape);
  for (float& value : t.span<float>()) value = static_cast<float>(low + (high - low) * rng.uniform());
  return t;
}

Tensor constant(const Dims& shape, double value) {
  Tensor t = Tensor::empty(shape);
  t.fill(value);
  return t;
}

void initialize(LinearLayer& layer, Rng& rng) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(std::max<std::int64_t>(layer.in, 1)));
  layer.weight = uniform(rng, {layer.out, layer.in}, -bound, bound);
  if (layer.has_bias) layer.bias = constant({layer.out}, 0.0);
}

void initialize(ConvLayer& layer, Rng& rng) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(layer.d_conv));
  layer.weight = uniform(rng, {layer.channels, 1, layer.d_conv}, -bound, bound);
  if (layer.has_bias) layer.bias = uniform(rng, {layer.channels}, -bound, bound);
}

void initialize(NormLayer& layer) {
  layer.weight = constant({layer.channels}, 1.0);
  if (!layer.rms) layer.bias = constant({layer.channels}, 0.0);
}

Tensor initial_dt_bias(Rng& rng, std::int64_t count, double dt_min, double dt_max, double floor) {
  Tensor bias = Tensor::empty({count});
  for (float& value : bias.span<float>()) {
    const double drawn =
        std::exp(std::log(dt_min) + rng.uniform_double() * (std::log(dt_max) - std::log(dt_min)));
    const double dt = std::max(drawn, floor);
    value = static_cast<float>(dt + std::log(-std::expm1(-dt)));
  }
  return bias;
}

}  // namespace krait
