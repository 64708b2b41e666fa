#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/optimizer/cpu/update_simd.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <cmath>

#include "ops/optimizer/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::optimizer_detail::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// Whole vectors and then lane by lane with vectors of one lane: the same operations either way.
template <typename D>
std::int64_t adamw_from(D d, std::int64_t i, const AdamWStep& s, const float* HWY_RESTRICT gradient,
                        float* HWY_RESTRICT parameter, float* HWY_RESTRICT m, float* HWY_RESTRICT v,
                        std::int64_t count) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto beta1 = hn::Set(d, s.beta1);
  const auto beta2 = hn::Set(d, s.beta2);
  const auto other1 = hn::Set(d, 1.0F - s.beta1);
  const auto other2 = hn::Set(d, 1.0F - s.beta2);
  for (; i + lanes <= count; i += lanes) {
    const auto g = hn::Mul(hn::LoadU(d, gradient + i), hn::Set(d, s.scale));
    const auto m1 = hn::MulAdd(beta1, hn::LoadU(d, m + i), hn::Mul(other1, g));
    const auto v1 = hn::MulAdd(beta2, hn::LoadU(d, v + i), hn::Mul(other2, hn::Mul(g, g)));
    const auto size = hn::MulAdd(hn::Sqrt(v1), hn::Set(d, s.correction), hn::Set(d, s.eps));
    const auto update = hn::Div(hn::Mul(hn::Set(d, s.rate), m1), size);
    const auto kept = hn::Mul(hn::LoadU(d, parameter + i), hn::Set(d, s.decay));
    hn::StoreU(hn::Sub(kept, update), d, parameter + i);
    hn::StoreU(m1, d, m + i);
    hn::StoreU(v1, d, v + i);
  }
  return i;
}

void adamw_simd(const AdamWStep& step, const float* gradient, float* parameter, float* m, float* v,
                std::int64_t count) {
  const std::int64_t done = adamw_from(hn::ScalableTag<float>(), 0, step, gradient, parameter, m, v, count);
  adamw_from(hn::CappedTag<float, 1>(), done, step, gradient, parameter, m, v, count);
}

template <typename D>
std::int64_t average_from(D d, std::int64_t i, float decay, const float* HWY_RESTRICT parameter,
                          float* HWY_RESTRICT average, std::int64_t count) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto other = hn::Set(d, 1.0F - decay);
  for (; i + lanes <= count; i += lanes) {
    const auto a = hn::LoadU(d, average + i);
    hn::StoreU(hn::MulAdd(other, hn::Sub(hn::LoadU(d, parameter + i), a), a), d, average + i);
  }
  return i;
}

void average_simd(float decay, const float* parameter, float* average, std::int64_t count) {
  const std::int64_t done = average_from(hn::ScalableTag<float>(), 0, decay, parameter, average, count);
  average_from(hn::CappedTag<float, 1>(), done, decay, parameter, average, count);
}

}  // namespace
}  // namespace krait::optimizer_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::optimizer_detail {

HWY_EXPORT(adamw_simd);
HWY_EXPORT(average_simd);

void adamw(const AdamWStep& step, const float* gradient, float* parameter, float* m, float* v,
           std::int64_t count) {
  HWY_DYNAMIC_DISPATCH(adamw_simd)(step, gradient, parameter, m, v, count);
}

void average(float decay, const float* parameter, float* average, std::int64_t count) {
  HWY_DYNAMIC_DISPATCH(average_simd)(decay, parameter, average, count);
}

// Eight sums side by side, which a compiler keeps in registers of any width: the order of additions, and so
// the result, is that of no particular one.
double sum_of_squares(const float* x, std::int64_t count) {
  constexpr std::int64_t kLanes = 8;
  double sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const auto value = static_cast<double>(x[i + lane]);
      sums[lane] += value * value;
    }
  double sum = 0.0;
  for (; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (const double part : sums) sum += part;
  return sum;
}

}  // namespace krait::optimizer_detail
#endif
