// core/simd/math-inl.h on every SIMD target that this processor runs, against the C library in f64.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/simd_math_test.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "core/simd/math-inl.h"

#ifndef KRAIT_TESTS_CORE_SIMD_MATH_TEST_ONCE
#define KRAIT_TESTS_CORE_SIMD_MATH_TEST_ONCE
namespace krait {
enum class Function {
  exp,
  exp2_bounded,
  exp2_flush,
  softplus,
  sigmoid,
  silu,
  silu_value,
  silu_derivative,
  sine,
  cosine
};
}  // namespace krait
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {
namespace {

// `count` is a multiple of 64.
void evaluate(Function function, const float* in, float* out, std::size_t count) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::ScalableTag<float> d;
  for (std::size_t i = 0; i < count; i += hn::Lanes(d)) {
    const auto x = hn::LoadU(d, in + i);
    auto y = x;
    switch (function) {
      case Function::exp: y = exp(d, x); break;
      case Function::exp2_bounded: {
        hn::Vec<decltype(d)> one[1] = {x};
        exp2_bounded(d, one);
        y = one[0];
        break;
      }
      case Function::exp2_flush: y = exp2_flush(d, x); break;
      case Function::softplus: y = softplus(d, x); break;
      case Function::sigmoid: y = sigmoid(d, x); break;
      case Function::silu: y = silu(d, x); break;
      case Function::silu_value:
      case Function::silu_derivative: {
        auto value = x;
        auto derivative = x;
        silu_with_derivative(d, x, value, derivative);
        y = function == Function::silu_value ? value : derivative;
        break;
      }
      case Function::sine:
      case Function::cosine: {
        auto sine = x;
        auto cosine = x;
        sincos_quarter_turns(d, x, sine, cosine);
        y = function == Function::sine ? sine : cosine;
        break;
      }
    }
    hn::StoreU(y, d, out + i);
  }
}

}  // namespace
}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/each_target.h"

namespace krait {
namespace {

using testing::on_each_target;

HWY_EXPORT(evaluate);

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kFlush = -87.3365F;  // below, e^x is 0 in softplus and sigmoid
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> evaluated(Function function, std::vector<float> in) {
  const std::size_t count = in.size();
  in.resize((count + 63) / 64 * 64);
  std::vector<float> out(in.size());
  HWY_DYNAMIC_DISPATCH(evaluate)(function, in.data(), out.data(), in.size());
  out.resize(count);
  return out;
}

// Every 2^k-th float between `from` and `to` (both of one sign).
void append_floats(std::vector<float>& values, float from, float to, std::uint32_t step) {
  const auto begin = std::min(std::bit_cast<std::uint32_t>(from), std::bit_cast<std::uint32_t>(to));
  const auto end = std::max(std::bit_cast<std::uint32_t>(from), std::bit_cast<std::uint32_t>(to));
  for (std::uint64_t bits = begin; bits <= end; bits += step)
    values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
}

// The distance in units of the last place of the f32 nearest to `exact` (subnormal spacing below 2^-126).
double ulps(float found, double exact) {
  const auto rounded = static_cast<float>(exact);
  if (found == rounded) return 0;  // both infinite, or equal
  if (std::isnan(found) || std::isinf(rounded)) return kInfinity;
  const int exponent = std::max(std::ilogb(std::max(std::abs(exact), 0x1p-126)), -126);
  return std::abs(static_cast<double>(found) - exact) / std::ldexp(1.0, exponent - 23);
}

template <typename Exact>
void expect_within(Function function, const std::vector<float>& in, double limit, const Exact& exact) {
  const std::vector<float> out = evaluated(function, in);
  double worst = 0;
  std::size_t at = 0;
  for (std::size_t i = 0; i < in.size(); ++i) {
    const double error = ulps(out[i], exact(static_cast<double>(in[i])));
    if (error > worst || std::isnan(error)) {
      worst = error;
      at = i;
    }
  }
  EXPECT_LE(worst, limit) << "at x = " << in[at] << ": " << out[at] << ", expected "
                          << exact(static_cast<double>(in[at]));
}

TEST(SimdMath, Exp) {
  std::vector<float> in;
  append_floats(in, 0x1p-30F, 120.0F, 1009);
  append_floats(in, -0x1p-30F, -120.0F, 1009);
  append_floats(in, 88.0F, 89.0F, 7);
  append_floats(in, -86.0F, -105.0F, 57);
  on_each_target([&] { expect_within(Function::exp, in, 1.0, [](double x) { return std::exp(x); }); });
}

TEST(SimdMath, Exp2Flush) {
  std::vector<float> in;
  append_floats(in, 0x1p-30F, 200.0F, 1009);
  append_floats(in, -0x1p-30F, -200.0F, 1009);
  append_floats(in, 127.0F, 128.5F, 61);
  on_each_target([&] {
    expect_within(Function::exp2_flush, in, 2.1, [](double x) { return x < -126 ? 0.0 : std::exp2(x); });
  });
}

TEST(SimdMath, Exp2BoundedHasTheSameBitsAsExp2Flush) {
  std::vector<float> in;
  append_floats(in, 0x1p-30F, 126.0F, 1009);
  append_floats(in, -0x1p-30F, -126.0F, 1009);
  on_each_target(
      [&] { EXPECT_EQ(evaluated(Function::exp2_bounded, in), evaluated(Function::exp2_flush, in)); });
}

TEST(SimdMath, SineAndCosineOfQuarterTurns) {
  std::vector<float> in = {0.0F, 0.5F, -0.5F, 1.0F, 2.0F, 3.0F, 4.0F, -1.0F, 1e6F, 4194303.5F};
  append_floats(in, 0x1p-30F, 4e6F, 1009);
  append_floats(in, -0x1p-30F, -4e6F, 1009);
  on_each_target([&] {
    const std::vector<float> sine = evaluated(Function::sine, in);
    const std::vector<float> cosine = evaluated(Function::cosine, in);
    for (std::size_t i = 0; i < in.size(); ++i) {
      const double angle = std::fmod(static_cast<double>(in[i]), 4.0) * std::acos(0.0);
      ASSERT_NEAR(sine[i], std::sin(angle), 0x1p-23) << "at " << in[i];
      ASSERT_NEAR(cosine[i], std::cos(angle), 0x1p-23) << "at " << in[i];
    }
    for (const Function function : {Function::sine, Function::cosine}) {
      for (const float y : evaluated(function, {1e9F, -3e20F, 3.4e38F})) EXPECT_LE(std::abs(y), 1.0F);
      for (const float y : evaluated(function, {kInfinity, -kInfinity, kNan})) EXPECT_TRUE(std::isnan(y));
    }
  });
}

TEST(SimdMath, Softplus) {
  std::vector<float> in;
  append_floats(in, 0x1p-30F, 1e30F, 1009);
  append_floats(in, -0x1p-30F, -120.0F, 1009);
  append_floats(in, 19.9F, 20.1F, 3);
  on_each_target([&] {
    expect_within(Function::softplus, in, 3.5, [](double x) {
      return x > 20 ? x : x < kFlush ? 0 : std::log1p(std::exp(x));
    });
  });
}

TEST(SimdMath, SigmoidAndSilu) {
  std::vector<float> in;
  append_floats(in, 0x1p-30F, 1e30F, 1009);
  append_floats(in, -0x1p-30F, -120.0F, 1009);
  on_each_target([&] {
    expect_within(Function::sigmoid, in, 4.0,
                  [](double x) { return x < kFlush ? 0 : 1 / (1 + std::exp(-x)); });
    expect_within(Function::silu, in, 5.0, [](double x) { return x < kFlush ? 0 : x / (1 + std::exp(-x)); });
  });
}

TEST(SimdMath, SiluWithDerivative) {
  std::vector<float> in = {0.0F, -1e30F};
  append_floats(in, 0x1p-30F, 1e30F, 1009);
  append_floats(in, -0x1p-30F, -120.0F, 1009);
  on_each_target([&] {
    expect_within(Function::silu_value, in, 6.0,
                  [](double x) { return x < kFlush ? 0 : x / (1 + std::exp(-x)); });
    const std::vector<float> derivative = evaluated(Function::silu_derivative, in);
    for (std::size_t i = 0; i < in.size(); ++i) {
      const double x = static_cast<double>(in[i]);
      const double e = std::exp(-std::abs(x));
      const double s = (x < 0 ? e : 1) / (1 + e);
      const double exact = s * (1 + x * ((x < 0 ? 1 : e) / (1 + e)));
      ASSERT_NEAR(derivative[i], exact, 0x1p-21) << "at " << in[i];
    }
  });
}

TEST(SimdMath, SpecialValues) {
  const std::vector<float> in = {0.0F, -0.0F, kInfinity, -kInfinity, kNan, -kNan, 1e38F, -1e38F, 1e-45F};
  on_each_target([&] {
    const auto expect = [&](Function function, std::vector<float> wanted, const char* name) {
      SCOPED_TRACE(name);
      const std::vector<float> out = evaluated(function, in);
      for (std::size_t i = 0; i < in.size(); ++i) {
        if (std::isnan(wanted[i]))
          EXPECT_TRUE(std::isnan(out[i])) << "at " << in[i] << ": " << out[i];
        else
          EXPECT_EQ(out[i], wanted[i]) << "at " << in[i];
      }
    };
    constexpr float kLog2 = 0.693147182F;
    expect(Function::exp, {1, 1, kInfinity, 0, kNan, kNan, kInfinity, 0, 1}, "exp");
    expect(Function::exp2_flush, {1, 1, kInfinity, 0, kNan, kNan, kInfinity, 0, 1}, "exp2_flush");
    expect(Function::softplus, {kLog2, kLog2, kInfinity, 0, kNan, kNan, 1e38F, 0, kLog2}, "softplus");
    expect(Function::sigmoid, {0.5F, 0.5F, 1, 0, kNan, kNan, 1, 0, 0.5F}, "sigmoid");
    // -infinity times 0, as in x / (1 + exp(-x)).
    expect(Function::silu, {0, 0, kInfinity, kNan, kNan, kNan, 1e38F, 0, 0}, "silu");
  });
}

}  // namespace
}  // namespace krait
#endif  // HWY_ONCE
