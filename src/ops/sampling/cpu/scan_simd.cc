#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/sampling/cpu/scan_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "core/simd/convert-inl.h"
#include "core/simd/math-inl.h"
#include "ops/sampling/sampling_internal.h"

HWY_BEFORE_NAMESPACE();
namespace krait::sampling::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = krait::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

constexpr float kLowest = std::numeric_limits<float>::lowest();

float maxima(std::span<const float> logits, std::span<float> group_max) {
  const D d;
  const std::size_t lanes = hn::Lanes(d);
  V all = hn::Set(d, -std::numeric_limits<float>::infinity());
  V nan = hn::Zero(d);
  for (std::size_t group = 0; group < group_max.size(); ++group) {
    const std::size_t begin = group * kGroup;
    const std::size_t end = std::min(begin + kGroup, logits.size());
    V largest = hn::Set(d, -std::numeric_limits<float>::infinity());
    std::size_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      const V v = hn::LoadU(d, logits.data() + i);
      largest = hn::Max(largest, v);
      nan = hn::Or(nan, hn::VecFromMask(d, hn::IsNaN(v)));
    }
    float result = hn::GetLane(hn::MaxOfLanes(d, largest));
    for (; i < end; ++i) {
      result = std::max(result, logits[i]);
      nan = hn::Or(nan, hn::VecFromMask(d, hn::IsNaN(hn::Set(d, logits[i]))));
    }
    group_max[group] = result;
    all = hn::Max(all, hn::Set(d, result));
  }
  // A true lane has all bits set, which reads as a NaN.
  if (!hn::AllFalse(d, hn::IsNaN(nan))) return std::numeric_limits<float>::quiet_NaN();
  return hn::GetLane(all);
}

struct Constants {
  V largest;
  V scale;
  V lowest;
};

// As a power of two: the scale includes log2(e).
HWY_INLINE V weight_of(D d, V logit, const Constants& c) {
  // The difference of two finite floats may overflow, and infinity times a scale of 0 is NaN.
  const V below = hn::Max(hn::Sub(logit, c.largest), hn::Set(d, kLowest));
  return hn::IfThenElseZero(hn::Ge(logit, c.lowest), simd::exp2_flush(d, hn::Mul(below, c.scale)));
}

HWY_INLINE Constants constants_of(D d, const Weighing& w) {
  constexpr float kLog2e = 1.44269504F;
  const float scale = std::min(w.scale * kLog2e, std::numeric_limits<float>::max());
  return {hn::Set(d, w.largest), hn::Set(d, scale), hn::Set(d, w.lowest)};
}

double weigh(std::span<const float> logits, const Weighing& weighing, std::span<double> group_sum) {
  const D d;
  const std::size_t lanes = hn::Lanes(d);
  const Constants c = constants_of(d, weighing);
  double total = 0.0;
  for (std::size_t group = 0; group < group_sum.size(); ++group) {
    const std::size_t end = std::min((group + 1) * kGroup, logits.size());
    std::size_t i = group * kGroup;
    V sum = hn::Zero(d);
    for (; i + lanes <= end; i += lanes) sum = hn::Add(sum, weight_of(d, hn::LoadU(d, logits.data() + i), c));
    if (i < end) {
      const V rest = weight_of(d, simd::load_f32_n(d, logits.data() + i, end - i), c);
      sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, end - i), rest));
    }
    group_sum[group] = static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
    total += group_sum[group];
  }
  return total;
}

void levels(std::span<const float> logits, const Weighing& weighing, const float* thresholds, double* sums) {
  const D d;
  const std::size_t lanes = hn::Lanes(d);
  const Constants c = constants_of(d, weighing);
  std::fill_n(sums, kLevels, 0.0);
  // A piece of weights in the first-level cache, then all thresholds over it.
  constexpr std::size_t kPiece = 8 * kGroup;
  HWY_ALIGN float weights[kPiece];
  for (std::size_t begin = 0; begin < logits.size(); begin += kPiece) {
    const float* piece = logits.data() + begin;
    const std::size_t count = std::min(kPiece, logits.size() - begin);
    const std::size_t whole = count / lanes * lanes;
    for (std::size_t i = 0; i < whole; i += lanes)
      hn::Store(weight_of(d, hn::LoadU(d, piece + i), c), d, weights + i);
    V rest_logit = hn::Zero(d);
    V rest = hn::Zero(d);
    if (whole < count) {
      rest_logit = simd::load_f32_n(d, piece + whole, count - whole);
      rest = hn::IfThenElseZero(hn::FirstN(d, count - whole), weight_of(d, rest_logit, c));
    }
    static_assert(kLevels % 4 == 0);
    for (std::size_t level = 0; level < kLevels; level += 4) {
      const V t0 = hn::Set(d, thresholds[level]);
      const V t1 = hn::Set(d, thresholds[level + 1]);
      const V t2 = hn::Set(d, thresholds[level + 2]);
      const V t3 = hn::Set(d, thresholds[level + 3]);
      V s0 = hn::IfThenElseZero(hn::Ge(rest_logit, t0), rest);
      V s1 = hn::IfThenElseZero(hn::Ge(rest_logit, t1), rest);
      V s2 = hn::IfThenElseZero(hn::Ge(rest_logit, t2), rest);
      V s3 = hn::IfThenElseZero(hn::Ge(rest_logit, t3), rest);
      for (std::size_t i = 0; i < whole; i += lanes) {
        const V logit = hn::LoadU(d, piece + i);
        const V weight = hn::Load(d, weights + i);
        s0 = hn::Add(s0, hn::IfThenElseZero(hn::Ge(logit, t0), weight));
        s1 = hn::Add(s1, hn::IfThenElseZero(hn::Ge(logit, t1), weight));
        s2 = hn::Add(s2, hn::IfThenElseZero(hn::Ge(logit, t2), weight));
        s3 = hn::Add(s3, hn::IfThenElseZero(hn::Ge(logit, t3), weight));
      }
      sums[level] += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, s0)));
      sums[level + 1] += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, s1)));
      sums[level + 2] += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, s2)));
      sums[level + 3] += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, s3)));
    }
  }
}

bool collect_ids(std::span<const float> logits, std::span<const float> group_max, float lowest, float below,
                 std::size_t limit, std::vector<std::int32_t>& ids) {
  const D d;
  const std::size_t lanes = hn::Lanes(d);
  static_assert(kGroup == 64);  // one bit for each logit of a group
  ids.clear();
  for (std::size_t group = 0; group < group_max.size(); ++group) {
    if (group_max[group] < lowest) continue;
    const float* logit = logits.data() + group * kGroup;
    const std::size_t count = std::min(kGroup, logits.size() - group * kGroup);
    std::uint64_t inside = 0;
    std::size_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      const V v = hn::LoadU(d, logit + i);
      const auto mask = hn::And(hn::Ge(v, hn::Set(d, lowest)), hn::Lt(v, hn::Set(d, below)));
      std::uint8_t bytes[8] = {};
      hn::StoreMaskBits(d, mask, bytes);
      std::uint64_t bits = 0;
      for (int b = 0; b < 8; ++b) bits |= std::uint64_t{bytes[b]} << (8 * b);
      inside |= bits << i;
    }
    for (; i < count; ++i)
      if (logit[i] >= lowest && logit[i] < below) inside |= std::uint64_t{1} << i;
    for (; inside != 0; inside &= inside - 1)
      ids.push_back(static_cast<std::int32_t>(group * kGroup) + std::countr_zero(inside));
    if (ids.size() > limit) return false;
  }
  return true;
}

}  // namespace krait::sampling::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::sampling {

HWY_EXPORT(maxima);
HWY_EXPORT(weigh);
HWY_EXPORT(levels);
HWY_EXPORT(collect_ids);

float scan_maxima(std::span<const float> logits, std::span<float> group_max) {
  return HWY_DYNAMIC_DISPATCH(maxima)(logits, group_max);
}

double scan_weights(std::span<const float> logits, const Weighing& weighing, std::span<double> group_sum) {
  return HWY_DYNAMIC_DISPATCH(weigh)(logits, weighing, group_sum);
}

std::array<double, kLevels> scan_levels(std::span<const float> logits, const Weighing& weighing,
                                        const Levels& thresholds) {
  std::array<double, kLevels> sums;
  HWY_DYNAMIC_DISPATCH(levels)(logits, weighing, thresholds.data(), sums.data());
  return sums;
}

bool collect(std::span<const float> logits, std::span<const float> group_max, float lowest, float below,
             std::size_t limit, std::vector<std::int32_t>& ids) {
  return HWY_DYNAMIC_DISPATCH(collect_ids)(logits, group_max, lowest, below, limit, ids);
}

}  // namespace krait::sampling
#endif
