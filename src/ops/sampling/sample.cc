// The fast draw. What costs is to look at all V logits, so that the work is a handful of vectorised scans;
// only a few candidates near the cut of top_k or top_p are ever sorted.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

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
  Row row{.logits = logits, .group_max = std::vector<float>(sampling::groups_of(logits.size()))};
  row.largest = sampling::scan_maxima(logits, row.group_max);
  return row;
}

// The weight of an id as the draw computes it, in f64.
class Weight {
 public:
  Weight(const Row& row, double temperature, float lowest)
      : row_(row), temperature_(temperature), lowest_(lowest) {}

  double operator()(std::int32_t id) const {
    const float logit = row_.logits[index(id)];
    if (logit < lowest_) return 0.0;
    return std::exp((static_cast<double>(logit) - static_cast<double>(row_.largest)) / temperature_);
  }

  // The same for whole scans, in f32.
  [[nodiscard]] sampling::Weighing weighing() const {
    constexpr double kMost = std::numeric_limits<float>::max();
    return {row_.largest, static_cast<float>(std::min(1.0 / temperature_, kMost)), lowest_};
  }

 private:
  const Row& row_;
  double temperature_;
  float lowest_;
};

// Of a few ids, the first whose cumulative weight exceeds u times the total.
std::int32_t pick(const Ids& ids, double u, const Weight& weight) {
  std::vector<double> weights(ids.size());
  std::transform(ids.begin(), ids.end(), weights.begin(), weight);
  const double target = u * std::accumulate(weights.begin(), weights.end(), 0.0);
  double cumulative = 0.0;
  std::size_t last = 0;  // the last of any weight, as u times the total may round up to the total
  for (std::size_t i = 0; i < ids.size() && cumulative <= target; ++i) {
    if (weights[i] > 0.0) last = i;
    cumulative += weights[i];
  }
  return ids[last];
}

// The same over all ids that `kept` admits, from the sums of groups.
template <typename Kept>
std::int32_t pick(const std::vector<double>& group_sum, std::size_t count, double u, const Weight& weight,
                  const Kept& kept) {
  const double target = u * std::accumulate(group_sum.begin(), group_sum.end(), 0.0);
  std::size_t group = 0;
  double before = 0.0;
  double cumulative = 0.0;
  for (std::size_t g = 0; g < group_sum.size() && cumulative <= target; ++g) {
    if (group_sum[g] <= 0.0) continue;
    group = g;
    before = cumulative;
    cumulative += group_sum[g];
  }
  // The sum of a group is rounded: a target beyond the sum of its members is the last of them.
  const std::size_t end = std::min((group + 1) * sampling::kGroup, count);
  auto last = static_cast<std::int32_t>(group * sampling::kGroup);
  for (std::int32_t id = last; index(id) < end && before <= target; ++id) {
    const double own = kept(id) ? weight(id) : 0.0;
    if (own > 0.0) last = id;
    before += own;
  }
  return last;
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
  sampling::collect(row.logits, row.group_max, lowest, kInfinity, kNoLimit, ids);
  std::vector<std::uint64_t> keys = rank_keys(row.logits, ids);
  if (keys.size() > k) {
    std::nth_element(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(k), keys.end());
    keys.resize(k);
  }
  std::sort(keys.begin(), keys.end());
  return keys;
}

std::int32_t draw_top_k(const Row& row, const SamplingOptions& options, double u) {
  const std::vector<std::uint64_t> keys = best(row, static_cast<std::size_t>(options.top_k));
  const Weight weight(row, options.temperature, kLowest);
  std::size_t kept = keys.size();
  if (sampling::has_top_p(options.top_p)) {
    std::vector<double> weights;
    for (const std::uint64_t key : keys) weights.push_back(weight(id_of(key)));
    const double wanted = options.top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
    double cumulative = 0.0;
    kept = 0;
    while (kept < keys.size() && cumulative < wanted) cumulative += weights[kept++];
  }
  Ids ids(kept);
  std::transform(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(kept), ids.begin(), id_of);
  std::sort(ids.begin(), ids.end());
  return pick(ids, u, weight);
}

// Logits in [lowest, below): the band in which the cut of top_p lies. `above` is the weight over the band.
struct Band {
  float lowest;
  float below;
  double above;
};

// The part of the band that holds the cut: between two of the falling thresholds, `sums` above which are
// known.
Band narrow(const Band& band, double wanted, const sampling::Levels& thresholds,
            const std::array<double, sampling::kLevels>& sums) {
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

struct Candidate {
  std::uint64_t key;
  double weight;
};

// The key of the first, in rank, with which the weight reaches `wanted`. Halves that cannot hold it are left
// alone: nothing is ever sorted.
std::uint64_t cut_of(std::vector<Candidate> candidates, double above, double wanted) {
  auto begin = candidates.begin();
  auto end = candidates.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end,
                     [](const Candidate& a, const Candidate& b) { return a.key < b.key; });
    double half = 0.0;
    for (auto candidate = begin; candidate != middle; ++candidate) half += candidate->weight;
    if (above + half >= wanted) {
      end = middle;
    } else {
      above += half;
      begin = middle;
    }
  }
  return begin->key;
}

constexpr std::size_t kFew = 1024;

// The rank key of the last token that top_p keeps.
std::uint64_t top_p_cut(const Row& row, const Weight& weight, float lowest, double temperature, double p) {
  // Steps of the logarithm of the weight, in which the top of a language model's distribution is spread out.
  // The last threshold is below all tokens: its sum is the total.
  constexpr std::array<double, sampling::kLevels - 1> kSteps{0.5, 1.0, 2.0, 3.5, 5.5, 8.0, 11.0};
  sampling::Levels thresholds{};
  const auto largest = static_cast<double>(row.largest);
  for (std::size_t level = 0; level < kSteps.size(); ++level)
    thresholds[level] = static_cast<float>(
        std::max<double>(largest - kSteps[level] * temperature, static_cast<double>(lowest)));
  thresholds.back() = lowest;
  auto sums = sampling::scan_levels(row.logits, weight.weighing(), thresholds);
  const double wanted = p * sums.back();
  Band band = narrow({.lowest = lowest, .below = kInfinity, .above = 0.0}, wanted, thresholds, sums);

  // A band of many tokens is cut finer, until few are left or (many equal logits) it cannot be.
  constexpr int kRounds = 8;
  Ids ids;
  bool few = sampling::collect(row.logits, row.group_max, band.lowest, band.below, kFew, ids);
  for (int round = 0; !few && round < kRounds; ++round) {
    const double top = std::min(static_cast<double>(band.below), largest);
    const double width = top - static_cast<double>(band.lowest);
    for (std::size_t level = 0; level < sampling::kLevels; ++level) {
      const double part = static_cast<double>(level + 1) / static_cast<double>(sampling::kLevels);
      thresholds[level] = std::max(static_cast<float>(top - width * part), band.lowest);
    }
    sums = sampling::scan_levels(row.logits, weight.weighing(), thresholds);
    band = narrow(band, wanted, thresholds, sums);
    few = sampling::collect(row.logits, row.group_max, band.lowest, band.below, kFew, ids);
  }
  if (!few) sampling::collect(row.logits, row.group_max, band.lowest, band.below, kNoLimit, ids);
  std::vector<Candidate> candidates;
  candidates.reserve(ids.size());
  for (const std::int32_t id : ids) candidates.push_back({rank_key(row.logits[index(id)], id), weight(id)});
  return cut_of(std::move(candidates), band.above, wanted);
}

std::int32_t draw_top_p(const Row& row, const Weight& weight, float lowest, const SamplingOptions& options,
                        double u) {
  const std::uint64_t cut = top_p_cut(row, weight, lowest, options.temperature, options.top_p);
  const float cut_logit = row.logits[index(id_of(cut))];
  const auto dropped = [&](std::int32_t id) { return rank_key(row.logits[index(id)], id) > cut; };
  Ids ids;
  if (sampling::collect(row.logits, row.group_max, cut_logit, kInfinity, kFew, ids)) {
    std::erase_if(ids, dropped);
    return pick(ids, u, weight);
  }
  // Many are kept: sums of groups instead of a list, less those that tie with the cut and come after it.
  const Weight kept(row, options.temperature, cut_logit);
  std::vector<double> group_sum(row.group_max.size());
  sampling::scan_weights(row.logits, kept.weighing(), group_sum);
  const float above_cut = std::nextafter(cut_logit, kInfinity);
  sampling::collect(row.logits, row.group_max, cut_logit, above_cut, kNoLimit, ids);
  std::erase_if(ids, [&](std::int32_t id) { return !dropped(id); });
  for (const std::int32_t id : ids) group_sum[index(id) / sampling::kGroup] -= kept(id);
  return pick(group_sum, row.logits.size(), u, kept, [&](std::int32_t id) { return !dropped(id); });
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

  std::vector<double> group_sum(raw.group_max.size());
  const double total = sampling::scan_weights(raw.logits, Weight(raw, 1.0, kLowest).weighing(), group_sum);

  std::int32_t id = 0;
  if (sampling::is_argmax(options)) {
    id = argmax(row);
  } else if (options.top_k > 0 && options.top_k < vocab_size) {
    id = draw_top_k(row, options, rng.uniform_double());
  } else {
    const float lowest = options.top_k == 0 ? sampling::min_p_threshold(row.largest, options.min_p) : kLowest;
    const Weight weight(row, options.temperature, lowest);
    const double u = rng.uniform_double();
    if (sampling::has_top_p(options.top_p)) {
      id = draw_top_p(row, weight, lowest, options, u);
    } else {
      // The weights of the raw logits are those of the draw where nothing changes the logits before it.
      if (!penalised.empty() || options.temperature != 1.0 || lowest != kLowest)
        sampling::scan_weights(row.logits, weight.weighing(), group_sum);
      id = pick(group_sum, count, u, weight, [](std::int32_t) { return true; });
    }
  }
  const double logit = static_cast<double>(logits[index(id)]) - static_cast<double>(raw.largest);
  return {.id = id, .logprob = static_cast<float>(logit - std::log(total))};
}

}  // namespace krait
