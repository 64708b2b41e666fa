#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/sampling/cpu/scan_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
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

HWY_INLINE V weight_of(D d, V logit, V largest, V scale, V lowest) {
  // The difference of two finite floats may overflow, and infinity times a scale of 0 is NaN.
  const V below = hn::Max(hn::Sub(logit, largest), hn::Set(d, kLowest));
  return hn::IfThenElseZero(hn::Ge(logit, lowest), simd::exp(d, hn::Mul(below, scale)));
}

double weigh(std::span<const float> logits, float largest, float scale, float lowest,
             std::span<float> weights, std::span<double> block_sum) {
  const D d;
  const std::size_t lanes = hn::Lanes(d);
  const V vlargest = hn::Set(d, largest);
  const V vscale = hn::Set(d, scale);
  const V vlowest = hn::Set(d, lowest);
  const bool keep = !weights.empty();
  double total = 0.0;
  for (std::size_t block = 0; block < block_sum.size(); ++block) {
    std::size_t i = block * kBlock;
    const std::size_t end = std::min(i + kBlock, logits.size());
    V sum0 = hn::Zero(d);
    V sum1 = hn::Zero(d);
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      const V w0 = weight_of(d, hn::LoadU(d, logits.data() + i), vlargest, vscale, vlowest);
      const V w1 = weight_of(d, hn::LoadU(d, logits.data() + i + lanes), vlargest, vscale, vlowest);
      sum0 = hn::Add(sum0, w0);
      sum1 = hn::Add(sum1, w1);
      if (keep) {
        hn::StoreU(w0, d, weights.data() + i);
        hn::StoreU(w1, d, weights.data() + i + lanes);
      }
    }
    while (i < end) {
      const std::size_t rest = std::min(lanes, end - i);
      V w = rest == lanes ? hn::LoadU(d, logits.data() + i) : simd::load_f32_n(d, logits.data() + i, rest);
      w = hn::IfThenElseZero(hn::FirstN(d, rest), weight_of(d, w, vlargest, vscale, vlowest));
      sum0 = hn::Add(sum0, w);
      if (keep && rest == lanes) hn::StoreU(w, d, weights.data() + i);
      if (keep && rest < lanes) simd::store_f32_n(d, w, weights.data() + i, rest);
      i += rest;
    }
    block_sum[block] = static_cast<double>(hn::GetLane(hn::SumOfLanes(d, hn::Add(sum0, sum1))));
    total += block_sum[block];
  }
  return total;
}

void levels(std::span<const float> logits, std::span<const float> weights, const float* thresholds,
            double* sums) {
  static_assert(kLevels == 8);
  const D d;
  const std::size_t lanes = hn::Lanes(d);
  std::fill_n(sums, kLevels, 0.0);
  for (std::size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const std::size_t end = std::min(begin + kBlock, logits.size());
    std::size_t i = begin;
    V s0 = hn::Zero(d);
    V s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
    const auto add = [&](V& sum, std::size_t level, V logit, V weight) HWY_ATTR {
      const auto above = hn::Ge(logit, hn::Set(d, thresholds[level]));
      sum = hn::Add(sum, hn::IfThenElseZero(above, weight));
    };
    const auto add_all = [&](V logit, V weight) HWY_ATTR {
      add(s0, 0, logit, weight);
      add(s1, 1, logit, weight);
      add(s2, 2, logit, weight);
      add(s3, 3, logit, weight);
      add(s4, 4, logit, weight);
      add(s5, 5, logit, weight);
      add(s6, 6, logit, weight);
      add(s7, 7, logit, weight);
    };
    for (; i + lanes <= end; i += lanes)
      add_all(hn::LoadU(d, logits.data() + i), hn::LoadU(d, weights.data() + i));
    if (i < end)  // the lanes beyond have weight 0
      add_all(simd::load_f32_n(d, logits.data() + i, end - i),
              simd::load_f32_n(d, weights.data() + i, end - i));
    const V all[kLevels] = {s0, s1, s2, s3, s4, s5, s6, s7};
    for (std::size_t level = 0; level < kLevels; ++level)
      sums[level] += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, all[level])));
  }
}

bool collect_ids(std::span<const float> logits, float lowest, float below, std::size_t limit,
                 std::vector<std::int32_t>& ids) {
  const D d;
  const std::size_t lanes = hn::Lanes(d);
  const V vlowest = hn::Set(d, lowest);
  ids.clear();
  const auto take = [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i)
      if (logits[i] >= lowest && logits[i] < below) ids.push_back(static_cast<std::int32_t>(i));
  };
  std::size_t i = 0;
  for (; i + lanes <= logits.size(); i += lanes) {
    if (hn::AllFalse(d, hn::Ge(hn::LoadU(d, logits.data() + i), vlowest))) continue;
    take(i, i + lanes);
    if (ids.size() > limit) return false;
  }
  take(i, logits.size());
  return ids.size() <= limit;
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

double scan_weights(std::span<const float> logits, float largest, float scale, float lowest,
                    std::span<float> weights, std::span<double> block_sum) {
  return HWY_DYNAMIC_DISPATCH(weigh)(logits, largest, scale, lowest, weights, block_sum);
}

std::array<double, kLevels> scan_levels(std::span<const float> logits, std::span<const float> weights,
                                        const std::array<float, kLevels>& thresholds) {
  std::array<double, kLevels> sums;
  HWY_DYNAMIC_DISPATCH(levels)(logits, weights, thresholds.data(), sums.data());
  return sums;
}

bool collect(std::span<const float> logits, float lowest, float below, std::size_t limit,
             std::vector<std::int32_t>& ids) {
  return HWY_DYNAMIC_DISPATCH(collect_ids)(logits, lowest, below, limit, ids);
}

}  // namespace krait::sampling
#endif
