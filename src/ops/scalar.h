// Functions of one number, as the references compute them.
#pragma once

#include <cmath>

namespace krait::scalar {

// log(1 + e^x), which is x beyond 20.
template <typename S>
S softplus(S x) {
  return x > S(20) ? x : std::log1p(std::exp(x));
}

template <typename S>
S silu(S x) {
  return x / (S(1) + std::exp(-x));
}

template <typename S>
S silu_derivative(S x) {
  const S sigmoid = S(1) / (S(1) + std::exp(-x));
  return sigmoid * (S(1) + x * (S(1) - sigmoid));
}

}  // namespace krait::scalar
