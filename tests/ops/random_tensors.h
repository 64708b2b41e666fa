// Random inputs in many layouts, and comparisons that say where tensors differ.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/each_target.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/core/tensor.h"

namespace krait::testing {

// Uniform integers in [low, high].
inline std::int64_t pick(Rng& rng, std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(rng.uniform_double() * static_cast<double>(high - low + 1));
}

inline bool coin(Rng& rng, double chance = 0.5) { return rng.uniform_double() < chance; }

// What fast paths take.
inline constexpr std::array kDtypes{DType::f32, DType::bf16, DType::f16};

inline DType random_dtype(Rng& rng) { return kDtypes[static_cast<std::size_t>(pick(rng, 0, 2))]; }

// The same elements in other memory: 0 contiguous, 1 rows of a wider matrix, 2 dimensions in reverse
// order, 3 every second element.
inline Tensor laid_out(const Tensor& t, int layout) {
  if (t.ndim() == 0 || layout == 0) return t;
  Tensor to;
  if (layout == 1) {
    Dims wide = t.shape();
    wide[t.ndim() - 1] += 5;
    to = Tensor::empty(wide, t.dtype()).slice(-1, 2, wide.back() - 3);
  } else {
    Dims strides = t.shape();
    std::int64_t step = layout == 2 ? 1 : 2;
    for (int i = 0; i < t.ndim(); ++i) {
      const int dim = layout == 2 ? i : t.ndim() - 1 - i;
      strides[dim] = step;
      step *= std::max<std::int64_t>(t.size(dim), 1);
    }
    to = Tensor::empty({step}, t.dtype()).as_strided(t.shape(), strides, 0);
  }
  to.copy_from(t);
  return to;
}

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

inline bool is_complex_dtype(DType dtype) { return dtype == DType::c64 || dtype == DType::c128; }

// Uniform in [low, high), both parts of complex ones, in a layout of laid_out or scattered.
inline constexpr int kScattered = 4;
inline Tensor random_tensor(Rng& rng, const Dims& shape, DType dtype = DType::f32, double low = -1.0,
                            double high = 1.0, int layout = 0) {
  const bool complex = is_complex_dtype(dtype);
  const Tensor numbers = Tensor::empty(shape, complex ? DType::c128 : DType::f64);
  auto* to = static_cast<double*>(numbers.raw());
  const std::int64_t count = numbers.numel() * (complex ? 2 : 1);
  for (std::int64_t i = 0; i < count; ++i) to[i] = low + (high - low) * rng.uniform_double();
  if (layout != kScattered) return laid_out(numbers.to(dtype), layout);
  const Tensor result = scattered(rng, shape, dtype);
  result.copy_from(numbers);
  return result;
}

// seq_idx (rows, length) with sequences of some ten tokens and padding.
inline Tensor random_ids(Rng& rng, std::int64_t rows, std::int64_t length) {
  const Tensor ids = Tensor::zeros({rows, length}, DType::i64);
  for (std::int64_t b = 0; b < rows; ++b)
    for (std::int64_t t = 0, id = 0; t < length; ++t) {
      if (coin(rng, 0.1)) ++id;
      ids.data<std::int64_t>()[b * length + t] = coin(rng, 0.15) ? -1 : id;
    }
  return ids;
}

// cu_seqlens of sequences that fill `length`, empty ones among them.
inline std::vector<std::int64_t> random_offsets(Rng& rng, std::int64_t length) {
  std::vector<std::int64_t> offsets = {0};
  while (offsets.back() < length) offsets.push_back(pick(rng, offsets.back(), length));
  return offsets;
}

// In f64; absent where `t` is.
inline Tensor to_f64(const Tensor& t) { return t ? t.to(DType::f64) : t; }

// What storing in `dtype` may change, relative to the value.
inline double rounding_of(DType dtype) {
  switch (dtype) {
    case DType::bf16: return 0x1p-8;
    case DType::f16: return 0x1p-11;
    case DType::f64: return 1e-13;
    default: return 2e-6;
  }
}

// Says where |found - expected| exceeds bound(expected), or is NaN. Parts of complex numbers count for
// themselves.
template <typename Bound>
void expect_within(const Tensor& found, const Tensor& expected, const Bound& bound, const std::string& what) {
  ASSERT_EQ(found.shape(), expected.shape()) << what;
  const bool complex = is_complex_dtype(expected.dtype());
  ASSERT_EQ(is_complex_dtype(found.dtype()), complex) << what;
  const Tensor a = found.to(complex ? DType::c128 : DType::f64).contiguous();
  const Tensor b = expected.to(complex ? DType::c128 : DType::f64).contiguous();
  const auto* x = static_cast<const double*>(a.raw());
  const auto* y = static_cast<const double*>(b.raw());
  const std::int64_t parts = complex ? 2 : 1;
  std::int64_t wrong = 0;
  std::int64_t first = -1;
  for (std::int64_t i = 0; i < a.numel() * parts; ++i) {
    if (std::abs(x[i] - y[i]) <= bound(y[i])) continue;
    if (first < 0) first = i;
    ++wrong;
  }
  if (first < 0) return;
  std::string at;
  std::int64_t rest = first / parts;
  for (int dim = a.ndim() - 1; dim >= 0; --dim) {
    at = std::to_string(rest % a.size(dim)) + (at.empty() ? "" : ", ") + at;
    rest /= a.size(dim);
  }
  ADD_FAILURE() << what << " of shape " << a.shape() << ": " << wrong << " of " << a.numel() * parts
                << " differ, the first at (" << at << "): " << x[first] << ", expected " << y[first]
                << " within " << bound(y[first]);
}

// |found - expected| <= tolerance * (1 + |expected|) everywhere.
inline void expect_close(const Tensor& found, const Tensor& expected, double tolerance,
                         const std::string& what) {
  ASSERT_TRUE(found.defined()) << what;
  expect_within(
      found, expected, [&](double y) { return tolerance * (1.0 + std::abs(y)); }, what);
}

// |found - expected| <= relative * |expected| + absolute * max |expected| everywhere: what a sum of many
// terms has lost by cancelling, no order of summation brings back. Both may be absent.
inline void expect_close(const Tensor& found, const Tensor& expected, double relative, double absolute,
                         const std::string& what) {
  ASSERT_EQ(found.defined(), expected.defined()) << what;
  if (!found) return;
  const bool complex = is_complex_dtype(expected.dtype());
  const Tensor numbers = expected.to(complex ? DType::c128 : DType::f64).contiguous();
  const auto* y = static_cast<const double*>(numbers.raw());
  double largest = 0.0;
  for (std::int64_t i = 0; i < numbers.numel() * (complex ? 2 : 1); ++i)
    largest = std::max(largest, std::abs(y[i]));
  expect_within(
      found, expected, [&](double value) { return relative * std::abs(value) + absolute * largest; }, what);
}

inline void expect_same_bits(const Tensor& found, const Tensor& expected, const std::string& what = "") {
  ASSERT_EQ(found.shape(), expected.shape()) << what;
  ASSERT_EQ(found.dtype(), expected.dtype()) << what;
  const Tensor a = found.contiguous();
  const Tensor b = expected.contiguous();
  if (a.numel() > 0) {
    EXPECT_EQ(std::memcmp(a.raw(), b.raw(), a.nbytes()), 0) << what;
  }
}

inline std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace krait::testing
