// What the readable distribution (filters.cc) and the fast draw (sample.cc) share, and the SIMD scans over a
// row of logits.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "krait/ops/sampling.h"

namespace krait::sampling {

// The checks that `sample` and `sampling_distribution` make before they look at a logit.
void check_arguments(std::span<const float> logits, std::int64_t vocab_size, const SamplingOptions& options);
// The message for a row without a largest finite logit, from its first bad value.
[[noreturn]] void fail_on_logits(std::span<const float> logits);

[[nodiscard]] bool is_argmax(const SamplingOptions& options);
[[nodiscard]] bool has_penalty(const SamplingOptions& options, std::span<const std::int64_t> previous);
[[nodiscard]] bool has_top_p(double p);
// The smallest logit that min_p keeps beside the largest one.
[[nodiscard]] float min_p_threshold(float largest, double min_p);

// Logits are scanned in groups of kGroup, which are also the blocks over which weights are summed.
inline constexpr std::size_t kGroup = 64;
[[nodiscard]] inline std::size_t groups_of(std::size_t count) { return (count + kGroup - 1) / kGroup; }

// The largest logit of each group into group_max; returns the largest of all, NaN where any logit is NaN.
float scan_maxima(std::span<const float> logits, std::span<float> group_max);

// Weights are exp((logit - largest) * scale) for logits >= lowest, a finite number, and 0 for others.
struct Weighing {
  float largest;
  float scale;
  float lowest;
};

// The sum of each group's weights into group_sum; returns the sum of all.
double scan_weights(std::span<const float> logits, const Weighing& weighing, std::span<double> group_sum);

// The sums of the weights of logits at and above each of kLevels thresholds.
inline constexpr std::size_t kLevels = 8;
using Levels = std::array<float, kLevels>;
std::array<double, kLevels> scan_levels(std::span<const float> logits, const Weighing& weighing,
                                        const Levels& thresholds);

// The ids, ascending, whose logit is in [lowest, below). Gives up, and returns false, beyond `limit` of them.
bool collect(std::span<const float> logits, std::span<const float> group_max, float lowest, float below,
             std::size_t limit, std::vector<std::int32_t>& ids);

// On a GPU.
void sample_rows_cuda(Context& ctx, const SampleRowsArgs& args);

}  // namespace krait::sampling
