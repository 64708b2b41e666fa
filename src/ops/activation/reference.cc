// The definitions, in f64.
#include <algorithm>
#include <cmath>
#include <numbers>

#include "ops/activation/kernels.h"

namespace krait::activation {
namespace {

constexpr double kCubic = 0.044715;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Of the standard normal distribution.
double cumulative(double x) { return 0.5 * (1 + std::erf(x / std::numbers::sqrt2)); }
double density(double x) { return std::exp(-0.5 * x * x) * std::numbers::inv_sqrtpi / std::numbers::sqrt2; }

const double kTanhScale = std::sqrt(2 * std::numbers::inv_pi);

}  // namespace

double gated_silu_reference(double x, double gate) { return x * gate / (1 + std::exp(-gate)); }

GatedSiluGradient gated_silu_backward_reference(double x, double gate, double dout) {
  const double s = sigmoid(gate);
  return {.dx = dout * gate * s, .dgate = dout * x * s * (1 + gate * (1 - s))};
}

double gelu_reference(double x, GeluKind kind) {
  if (kind == GeluKind::exact) return x * cumulative(x);
  return 0.5 * x * (1 + std::tanh(kTanhScale * (x + kCubic * x * x * x)));
}

double gelu_backward_reference(double x, double dout, GeluKind kind) {
  if (kind == GeluKind::exact) return dout * (cumulative(x) + x * density(x));
  // Beyond 12 the slope is 0 or 1 in f64; the cube of much larger values would overflow.
  const double v = std::clamp(x, -12.0, 12.0);
  const double t = std::tanh(kTanhScale * (v + kCubic * v * v * v));
  const double inner = kTanhScale * (1 + 3 * kCubic * v * v);
  return dout * 0.5 * (1 + t + v * (1 - t * t) * inner);
}

}  // namespace krait::activation
