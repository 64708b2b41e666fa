// Tensors with random elements and any strides, and comparisons of tensors.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "krait/core/random.h"
#include "krait/core/tensor.h"

namespace krait {

inline bool is_complex_dtype(DType dtype) { return dtype == DType::c64 || dtype == DType::c128; }

// A tensor whose strides are in no particular order: dimensions permuted, every other element left out,
// some dimensions running backwards.
inline Tensor scattered(Rng& rng, const Dims& shape, DType dtype) {
  std::vector<int> order(static_cast<std::size_t>(shape.size()));
  for (int i = 0; i < shape.size(); ++i) order[static_cast<std::size_t>(i)] = i;
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.next_u32() % i]);
  Dims strides = shape;
  std::int64_t step = 1 + rng.next_u32() % 2;
  std::int64_t offset = 0;
  for (const int dim : order) {
    const bool backwards = rng.next_u32() % 3 == 0;
    strides[dim] = backwards ? -step : step;
    if (backwards) offset += (std::max<std::int64_t>(shape[dim], 1) - 1) * step;
    step *= std::max<std::int64_t>(shape[dim], 1) + rng.next_u32() % 2;
  }
  return Tensor::zeros({step + 1}, dtype).as_strided(shape, strides, offset);
}

// Uniform in [low, high), both parts of complex ones.
inline Tensor random_tensor(Rng& rng, const Dims& shape, DType dtype, double low, double high,
                            bool scatter = false) {
  const Tensor numbers = Tensor::empty(shape, is_complex_dtype(dtype) ? DType::c128 : DType::f64);
  auto* to = static_cast<double*>(numbers.raw());
  const std::int64_t count = numbers.numel() * (is_complex_dtype(dtype) ? 2 : 1);
  for (std::int64_t i = 0; i < count; ++i) to[i] = low + (high - low) * rng.uniform_double();
  if (!scatter) return numbers.to(dtype);
  const Tensor result = scattered(rng, shape, dtype);
  result.copy_from(numbers);
  return result;
}

// |found - expected| <= relative |expected| + absolute * max |expected|.
inline void expect_close(const Tensor& found, const Tensor& expected, double relative, double absolute,
                         const char* what) {
  SCOPED_TRACE(what);
  ASSERT_EQ(found.defined(), expected.defined());
  if (!found) return;
  ASSERT_EQ(found.shape(), expected.shape());
  const bool complex = is_complex_dtype(found.dtype());
  const Tensor a = found.to(complex ? DType::c128 : DType::f64).contiguous();
  const Tensor b = expected.to(complex ? DType::c128 : DType::f64).contiguous();
  const std::int64_t count = a.numel() * (complex ? 2 : 1);
  const auto* x = static_cast<const double*>(a.raw());
  const auto* y = static_cast<const double*>(b.raw());
  double largest = 0;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(y[i]));
  for (std::int64_t i = 0; i < count; ++i)
    ASSERT_LE(std::abs(x[i] - y[i]), relative * std::abs(y[i]) + absolute * largest)
        << "element " << i << " is " << x[i] << ", expected " << y[i];
}

inline void expect_same_bits(const Tensor& a, const Tensor& b) {
  ASSERT_EQ(a.shape(), b.shape());
  ASSERT_EQ(a.dtype(), b.dtype());
  const Tensor x = a.contiguous();
  const Tensor y = b.contiguous();
  if (a.numel() == 0) return;
  EXPECT_EQ(std::memcmp(x.raw(), y.raw(), x.nbytes()), 0);
}

}  // namespace krait
