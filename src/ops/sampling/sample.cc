// The fast draw. What costs is to look at all V logits, so that the work is a handful of vectorised scans;
// only a few candidates near the cut of top_k or top_p are ever sorted.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "krait/core/error.h"
#include "krait/ops/sampling.h"
#include "ops/sampling/sampling_internal.h"

namespace krait {
namespace {

using Ids = std::vector<std::int32_t>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr std::size_t kNoLimit = std::numeric_limits<std::size_t>::max();

// The logits that the draw looks at, and what was found out about them.
struct Row {
  std::span<const float> logits;
  float largest = 0.0F;
  std::vector<float> group_max;
};

struct Weights {
  std::vector<float> of_id;  // relative to that of the largest logit
  std::vector<double> block_sum;
  double total = 0.0;
};

std::size_t index(std::int32_t id) { return static_cast<std::size_t>(id); }

// Numbers whose ascending order is that of falling logits, then of rising ids.
std::uint64_t rank_key(float logit, std::int32_t id) {
  const auto bits = std::bit_cast<std::uint32_t>(logit == 0.0F ? 0.0F : logit);  // -0 equals 0
  const std::uint32_t rising = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  return static_cast<std::uint64_t>(~rising) << 32 | static_cast<std::uint32_t>(id);
}

std::int32_t id_of(std::uint64_t key) { return static_cast<std::int32_t>(key & 0xffffffffU); }

std::vector<std::uint64_t> rank_keys(std::span<const float> logits, const Ids& ids) {
  std::vector<std::uint64_t> keys;
  keys.reserve(ids.size());
  for (const std::int32_t id : ids) keys.push_back(rank_key(logits[index(id)], id));
  return keys;
}

Row scan(std::span<const float> logits) {
  Row row{.logits = logits,
          .group_max = std::vector<float>((logits.size() + sampling::kGroup - 1) / sampling::kGroup)};
  row.largest = sampling::scan_maxima(logits, row.group_max);
  return row;
}

// Of ids and their weights, the first id whose cumulative weight exceeds u times the total.
template <typename WeightOf>
std::int32_t pick(const Ids& ids, double u, const WeightOf& weight_of) {
  double total = 0.0;
  for (const std::int32_t id : ids) total += weight_of(id);
  double cumulative = 0.0;
  std::int32_t last = ids.front();
  for (const std::int32_t id : ids) {
    const double weight = weight_of(id);
    if (weight > 0.0) last = id;
    cumulative += weight;
    if (cumulative > u * total) return id;
  }
  return last;  // u * total may round up to the total
}

std::int32_t pick(const Weights& weights, double u) {
  const double target = u * weights.total;
  std::size_t block = 0;
  double before = 0.0;
  double cumulative = 0.0;
  for (std::size_t b = 0; b < weights.block_sum.size() && cumulative <= target; ++b) {
    if (weights.block_sum[b] == 0.0) continue;
    block = b;
    before = cumulative;
    cumulative += weights.block_sum[b];
  }
  const std::size_t begin = block * sampling::kBlock;
  const std::size_t end = std::min(begin + sampling::kBlock, weights.of_id.size());
  // The sum of a block is rounded: a target beyond the sum of its members is the last of them.
  std::size_t last = begin;
  for (std::size_t i = begin; i < end && before <= target; ++i) {
    if (weights.of_id[i] == 0.0F) continue;
    last = i;
    before += static_cast<double>(weights.of_id[i]);
  }
  return static_cast<std::int32_t>(last);
}

// The keys of the k best, best first.
std::vector<std::uint64_t> best(const Row& row, std::size_t k) {
  // At least k logits reach the k-th largest maximum of a group; few others do.
  float lowest = kLowest;
  if (k <= row.group_max.size()) {
    std::vector<float> maxima = row.group_max;
    const auto kth = maxima.begin() + static_cast<std::ptrdiff_t>(k) - 1;
    std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<>());
    lowest = std::max(*kth, kLowest);
  }
  Ids ids;
  sampling::collect(row.logits, lowest, kInfinity, kNoLimit, ids);
  std::vector<std::uint64_t> keys = rank_keys(row.logits, ids);
  if (keys.size() > k) {
    const auto end = keys.begin() + static_cast<std::ptrdiff_t>(k);
    std::nth_element(keys.begin(), end, keys.end());
    keys.resize(k);
  }
  std::sort(keys.begin(), keys.end());
  return keys;
}

std::int32_t draw_top_k(const Row& row, const SamplingOptions& options, double u) {
  const std::vector<std::uint64_t> keys = best(row, static_cast<std::size_t>(options.top_k));
  const auto weight_of = [&](std::int32_t id) {
    const double below = static_cast<double>(row.logits[index(id)]) - static_cast<double>(row.largest);
    return std::exp(below / options.temperature);
  };
  std::size_t kept = keys.size();
  if (sampling::has_top_p(options.top_p)) {
    double total = 0.0;
    for (const std::uint64_t key : keys) total += weight_of(id_of(key));
    double cumulative = 0.0;
    kept = 0;
    while (kept < keys.size() && cumulative < options.top_p * total)
      cumulative += weight_of(id_of(keys[kept++]));
  }
  Ids ids(kept);
  for (std::size_t i = 0; i < kept; ++i) ids[i] = id_of(keys[i]);
  std::sort(ids.begin(), ids.end());
  return pick(ids, u, weight_of);
}

// Logits in [lowest, below): the band in which the cut of top_p lies. `above` is the weight over the band.
struct Band {
  float lowest;
  float below;
  double above;
};

// The part of the band that holds the cut, among those between the falling thresholds.
Band narrow(const Row& row, const Weights& weights, const Band& band, double wanted,
            const std::array<float, sampling::kLevels>& thresholds) {
  const auto sums = sampling::scan_levels(row.logits, weights.of_id, thresholds);
  Band result = band;
  for (std::size_t level = 0; level < sampling::kLevels; ++level) {
    if (sums[level] >= wanted) {
      result.lowest = thresholds[level];
      break;
    }
    result.below = thresholds[level];
    result.above = sums[level];
  }
  return result;
}

// The rank key of the last token that top_p keeps.
std::uint64_t top_p_cut(const Row& row, const Weights& weights, float lowest, double temperature, double p) {
  const double wanted = p * weights.total;
  // Steps of the logarithm of the weight, in which the top of a language model's distribution is spread out.
  constexpr std::array<double, sampling::kLevels> kSteps{0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0, 11.0};
  std::array<float, sampling::kLevels> thresholds{};
  const auto largest = static_cast<double>(row.largest);
  for (std::size_t level = 0; level < sampling::kLevels; ++level)
    thresholds[level] = static_cast<float>(
        std::max<double>(largest - kSteps[level] * temperature, static_cast<double>(lowest)));
  Band band = narrow(row, weights, {.lowest = lowest, .below = kInfinity, .above = 0.0}, wanted, thresholds);

  // A band of many tokens is cut finer, until few are left or (many equal logits) it cannot be.
  constexpr std::size_t kFew = 1024;
  constexpr int kRounds = 8;
  Ids ids;
  bool few = sampling::collect(row.logits, band.lowest, band.below, kFew, ids);
  for (int round = 0; !few && round < kRounds; ++round) {
    const double top = std::min(static_cast<double>(band.below), largest);
    const double width = top - static_cast<double>(band.lowest);
    for (std::size_t level = 0; level < sampling::kLevels; ++level) {
      const double part = static_cast<double>(level + 1) / static_cast<double>(sampling::kLevels);
      thresholds[level] = std::max(static_cast<float>(top - width * part), band.lowest);
    }
    band = narrow(row, weights, band, wanted, thresholds);
    few = sampling::collect(row.logits, band.lowest, band.below, kFew, ids);
  }
  if (!few) sampling::collect(row.logits, band.lowest, band.below, kNoLimit, ids);

  std::vector<std::uint64_t> keys = rank_keys(row.logits, ids);
  std::sort(keys.begin(), keys.end());
  double cumulative = band.above;
  std::uint64_t cut = 0;
  for (const std::uint64_t key : keys) {
    cut = key;
    cumulative += static_cast<double>(weights.of_id[index(id_of(key))]);
    if (cumulative >= wanted) break;
  }
  return cut;
}

std::int32_t draw_top_p(const Row& row, const Weights& weights, float lowest, const SamplingOptions& options,
                        double u) {
  const std::uint64_t cut = top_p_cut(row, weights, lowest, options.temperature, options.top_p);
  Ids ids;
  sampling::collect(row.logits, row.logits[index(id_of(cut))], kInfinity, kNoLimit, ids);
  std::erase_if(ids, [&](std::int32_t id) { return rank_key(row.logits[index(id)], id) > cut; });
  return pick(ids, u, [&](std::int32_t id) { return static_cast<double>(weights.of_id[index(id)]); });
}

Weights weigh(const Row& row, double temperature, float lowest, bool keep) {
  Weights weights;
  if (keep) weights.of_id.resize(row.logits.size());
  weights.block_sum.resize((row.logits.size() + sampling::kBlock - 1) / sampling::kBlock);
  const auto scale =
      static_cast<float>(std::min<double>(1.0 / temperature, std::numeric_limits<float>::max()));
  weights.total =
      sampling::scan_weights(row.logits, row.largest, scale, lowest, weights.of_id, weights.block_sum);
  return weights;
}

std::int32_t argmax(const Row& row) {
  std::size_t group = 0;
  while (row.group_max[group] != row.largest) ++group;
  std::size_t id = group * sampling::kGroup;
  while (row.logits[id] != row.largest) ++id;
  return static_cast<std::int32_t>(id);
}

}  // namespace

Sample sample(std::span<const float> logits, std::int64_t vocab_size, std::span<const std::int64_t> previous,
              const SamplingOptions& options, Rng& rng) {
  sampling::check_arguments(logits, vocab_size, options);
  const auto count = static_cast<std::size_t>(vocab_size);
  const Row raw = scan(logits.first(count));
  // Also true for NaN.
  if (!(raw.largest >= kLowest && raw.largest < kInfinity)) sampling::fail_on_logits(raw.logits);

  std::vector<float> penalised;
  Row penalised_row;
  if (sampling::has_penalty(options, previous)) {
    penalised.assign(logits.begin(), logits.end());
    apply_repetition_penalty(penalised, previous, options.repetition_penalty);
    penalised_row = scan(std::span(penalised).first(count));
  }
  const Row& row = penalised.empty() ? raw : penalised_row;

  const bool choose_best = sampling::is_argmax(options);
  const bool top_k = !choose_best && options.top_k > 0 && options.top_k < vocab_size;
  const float lowest = options.top_k == 0 ? sampling::min_p_threshold(row.largest, options.min_p) : kLowest;
  // The weights of the raw logits are those of the draw where nothing changes the logits before it.
  const bool draws_from_weights = !choose_best && !top_k;
  const bool same_weights = penalised.empty() && options.temperature == 1.0 && lowest == kLowest;
  Weights weights = weigh(raw, 1.0, kLowest, draws_from_weights && same_weights);
  const double log_total = std::log(weights.total);

  std::int32_t id = 0;
  if (choose_best) {
    id = argmax(row);
  } else {
    const double u = rng.uniform_double();
    if (top_k) {
      id = draw_top_k(row, options, u);
    } else {
      if (!same_weights) weights = weigh(row, options.temperature, lowest, true);
      id = sampling::has_top_p(options.top_p) ? draw_top_p(row, weights, lowest, options, u)
                                              : pick(weights, u);
    }
  }
  const double logit = static_cast<double>(logits[index(id)]) - static_cast<double>(raw.largest);
  return {.id = id, .logprob = static_cast<float>(logit - log_total)};
}

}  // namespace krait
