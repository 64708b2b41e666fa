#include <cmath>
#include <numbers>

#include "ops/activation/kernels.h"

namespace krait::activation {

template <typename T>
T gated_silu_reference(T x, T gate) {
  return x * gate / (1 + std::exp(-gate));
}

template <typename T>
T gelu_reference(T x, GeluKind kind) {
  if (kind == GeluKind::exact) return T(0.5) * x * (1 + std::erf(x / std::numbers::sqrt2_v<T>));
  const T inner = std::sqrt(2 * std::numbers::inv_pi_v<T>) * (x + T(0.044715) * x * x * x);
  return T(0.5) * x * (1 + std::tanh(inner));
}

template float gated_silu_reference(float, float);
template double gated_silu_reference(double, double);
template float gelu_reference(float, GeluKind);
template double gelu_reference(double, GeluKind);

}  // namespace krait::activation
