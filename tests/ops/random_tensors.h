// Random inputs in many layouts, and comparisons that say where tensors differ.
#pragma once

#include <gtest/gtest.h>
#include <hwy/highway.h>
#include <hwy/targets.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/core/tensor.h"

namespace krait::testing {

// Uniform integers in [low, high].
inline std::int64_t pick(Rng& rng, std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(rng.uniform_double() * static_cast<double>(high - low + 1));
}

inline bool coin(Rng& rng, double chance = 0.5) { return rng.uniform_double() < chance; }

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

inline Tensor random_tensor(Rng& rng, const Dims& shape, DType dtype = DType::f32, double low = -1.0,
                            double high = 1.0, int layout = 0) {
  const Tensor t = Tensor::empty(shape, DType::f64);
  for (std::int64_t i = 0; i < t.numel(); ++i)
    t.data<double>()[i] = low + (high - low) * rng.uniform_double();
  return laid_out(t.to(dtype), layout);
}

// What storing in `dtype` may change, relative to the value.
inline double rounding_of(DType dtype) {
  switch (dtype) {
    case DType::bf16: return 0x1p-8;
    case DType::f16: return 0x1p-11;
    case DType::f64: return 1e-13;
    default: return 2e-6;
  }
}

// |found - expected| <= tolerance * (1 + |expected|) everywhere, and no NaN.
inline void expect_close(const Tensor& found, const Tensor& expected, double tolerance,
                         const std::string& what) {
  ASSERT_TRUE(found.defined()) << what;
  ASSERT_EQ(found.shape(), expected.shape()) << what;
  const Tensor a = found.to(DType::f64).contiguous();
  const Tensor b = expected.to(DType::f64).contiguous();
  std::int64_t wrong = 0;
  std::int64_t first = -1;
  for (std::int64_t i = 0; i < a.numel(); ++i) {
    const double x = a.data<double>()[i];
    const double y = b.data<double>()[i];
    if (std::abs(x - y) <= tolerance * (1.0 + std::abs(y))) continue;
    if (first < 0) first = i;
    ++wrong;
  }
  if (first < 0) return;
  std::string at;
  std::int64_t rest = first;
  for (int dim = a.ndim() - 1; dim >= 0; --dim) {
    at = std::to_string(rest % a.size(dim)) + (at.empty() ? "" : ", ") + at;
    rest /= a.size(dim);
  }
  ADD_FAILURE() << what << " of shape " << a.shape() << ": " << wrong << " of " << a.numel()
                << " differ, the first at (" << at << "): " << a.data<double>()[first] << ", expected "
                << b.data<double>()[first] << " within " << tolerance;
}

inline void expect_same_bits(const Tensor& found, const Tensor& expected, const std::string& what) {
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

// Calls body once for each SIMD target of this program and processor. Any source with Highway code has
// the same HWY_TARGETS.
inline void on_each_target(const std::function<void()>& body) {
  auto targets = static_cast<std::uint64_t>(hwy::SupportedTargets() & HWY_TARGETS);
  for (; targets != 0; targets &= targets - 1) {
    const auto target = static_cast<std::int64_t>(targets & (~targets + 1));
    hwy::SetSupportedTargetsForTest(target);
    SCOPED_TRACE(hwy::TargetName(target));
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
}

}  // namespace krait::testing
