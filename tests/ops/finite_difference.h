// Gradients against central differences in f64.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "krait/core/tensor.h"

namespace krait::test {

// `gradient` (f64, contiguous, input's shape) of the scalar loss() by each element of `input` (f64,
// contiguous), which loss() reads anew at each call. c128 tensors are checked part by part.
inline void expect_gradient(const std::function<double()>& loss, const Tensor& input, const Tensor& gradient,
                            const char* name, double tolerance = 1e-6) {
  SCOPED_TRACE(name);
  ASSERT_TRUE(input.is_contiguous() && gradient.is_contiguous());
  ASSERT_EQ(input.dtype(), gradient.dtype());
  ASSERT_TRUE(input.shape() == gradient.shape()) << input.shape() << " and " << gradient.shape();
  const bool complex = input.dtype() == DType::c128;
  ASSERT_TRUE(complex || input.dtype() == DType::f64);
  const std::int64_t count = input.numel() * (complex ? 2 : 1);
  auto* x = static_cast<double*>(input.raw());
  const auto* dx = static_cast<const double*>(gradient.raw());
  for (std::int64_t i = 0; i < count; ++i) {
    const double kept = x[i];
    const double h = 1e-5 * std::max(1.0, std::abs(kept));
    x[i] = kept + h;
    const double above = loss();
    x[i] = kept - h;
    const double below = loss();
    x[i] = kept;
    const double expected = (above - below) / (2.0 * h);
    EXPECT_NEAR(dx[i], expected, tolerance * std::max(1.0, std::abs(expected))) << "element " << i;
  }
}

// sum(values * weights), for tensors of f64 of one shape: a loss whose gradient by `values` is `weights`.
inline double weighted_sum(const Tensor& values, const Tensor& weights) {
  const Tensor a = values.contiguous();
  const Tensor b = weights.contiguous();
  const std::int64_t count = a.numel() * (a.dtype() == DType::c128 ? 2 : 1);
  const auto* pa = static_cast<const double*>(a.raw());
  const auto* pb = static_cast<const double*>(b.raw());
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) sum += pa[i] * pb[i];
  return sum;
}

}  // namespace krait::test
