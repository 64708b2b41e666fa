#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/ceilings_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cstdint>

#include "bench/ceilings.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

float sum_floats(const float* values, std::int64_t count) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  auto a = hn::Zero(d);
  auto b = a;
  auto c = a;
  auto e = a;
  std::int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    a = hn::Add(a, hn::LoadU(d, values + i));
    b = hn::Add(b, hn::LoadU(d, values + i + lanes));
    c = hn::Add(c, hn::LoadU(d, values + i + 2 * lanes));
    e = hn::Add(e, hn::LoadU(d, values + i + 3 * lanes));
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
}

// Ten independent chains hide the latency of a fused multiply-add on every machine that we know. They start
// from different values: a compiler computes equal chains once, and the rate would be that of a latency.
double multiply_add(std::int64_t rounds, float* sink) {
  const hn::ScalableTag<float> d;
  const auto x = hn::Set(d, 0.999F);
  const auto y = hn::Set(d, 0.001F);
  auto a0 = hn::Set(d, sink[0]), a1 = hn::Set(d, sink[1]), a2 = hn::Set(d, sink[2]), a3 = hn::Set(d, sink[3]),
       a4 = hn::Set(d, sink[4]), a5 = hn::Set(d, sink[5]), a6 = hn::Set(d, sink[6]), a7 = hn::Set(d, sink[7]),
       a8 = hn::Set(d, sink[8]), a9 = hn::Set(d, sink[9]);
  for (std::int64_t i = 0; i < rounds; ++i) {
    a0 = hn::MulAdd(a0, x, y);
    a1 = hn::MulAdd(a1, x, y);
    a2 = hn::MulAdd(a2, x, y);
    a3 = hn::MulAdd(a3, x, y);
    a4 = hn::MulAdd(a4, x, y);
    a5 = hn::MulAdd(a5, x, y);
    a6 = hn::MulAdd(a6, x, y);
    a7 = hn::MulAdd(a7, x, y);
    a8 = hn::MulAdd(a8, x, y);
    a9 = hn::MulAdd(a9, x, y);
  }
  const auto all = hn::Add(hn::Add(hn::Add(a0, a1), hn::Add(a2, a3)),
                           hn::Add(hn::Add(hn::Add(a4, a5), hn::Add(a6, a7)), hn::Add(a8, a9)));
  *sink = hn::GetLane(hn::SumOfLanes(d, all));
  return 2.0 * 10.0 * static_cast<double>(hn::Lanes(d)) * static_cast<double>(rounds);
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait {

HWY_EXPORT(sum_floats);
HWY_EXPORT(multiply_add);

float sum_floats(const float* values, std::int64_t count) {
  return HWY_DYNAMIC_DISPATCH(sum_floats)(values, count);
}
double multiply_add(std::int64_t rounds, float* sink) {
  return HWY_DYNAMIC_DISPATCH(multiply_add)(rounds, sink);
}

}  // namespace krait
#endif
