// The semantics of sampling, plainly: whole sorts, f64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "krait/core/error.h"
#include "krait/ops/sampling.h"
#include "ops/sampling/sampling_internal.h"

namespace krait {
namespace {

constexpr float kDropped = -std::numeric_limits<float>::infinity();

// Ids from the largest logit to the smallest, equal logits by id. NaN counts as the smallest.
std::vector<std::size_t> ranking(std::span<const float> logits) {
  std::vector<std::size_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), std::size_t{0});
  std::stable_sort(ids.begin(), ids.end(), [&](std::size_t a, std::size_t b) {
    if (std::isnan(logits[b])) return !std::isnan(logits[a]);
    return logits[a] > logits[b];
  });
  return ids;
}

void drop_from(std::span<float> logits, const std::vector<std::size_t>& ranked, std::size_t kept) {
  for (std::size_t i = kept; i < ranked.size(); ++i) logits[ranked[i]] = kDropped;
}

std::vector<double> exponentials(std::span<const float> logits, double temperature) {
  std::vector<double> weights(logits.size());
  if (logits.empty()) return weights;
  const double largest = *std::max_element(logits.begin(), logits.end());
  for (std::size_t i = 0; i < logits.size(); ++i)
    weights[i] = std::exp((static_cast<double>(logits[i]) - largest) / temperature);
  return weights;
}

// filter_top_p of logits / temperature. The temperature changes weights and no order.
void keep_top_p(std::span<float> logits, double p, double temperature) {
  if (!sampling::has_top_p(p) || logits.empty()) return;
  const std::vector<std::size_t> ranked = ranking(logits);
  const std::vector<double> weights = exponentials(logits, temperature);
  double total = 0.0;
  for (const std::size_t id : ranked) total += weights[id];
  double cumulative = 0.0;
  std::size_t kept = 0;
  while (kept < ranked.size() && cumulative < p * total) cumulative += weights[ranked[kept++]];
  drop_from(logits, ranked, kept);
}

std::vector<float> normalised(const std::vector<double>& weights) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<float> probabilities(weights.size());
  for (std::size_t i = 0; i < weights.size(); ++i) probabilities[i] = static_cast<float>(weights[i] / total);
  return probabilities;
}

}  // namespace

namespace sampling {

void check_arguments(std::span<const float> logits, std::int64_t vocab_size, const SamplingOptions& options) {
  validate(options);
  require(vocab_size > 0 && static_cast<std::uint64_t>(vocab_size) <= logits.size(),
          "[sampling] vocab_size is ", vocab_size, ", expected 1 to ", logits.size(),
          ", the number of logits");
  require(logits.size() <= static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()), "[sampling] ",
          logits.size(), " logits, expected fewer than 2^31");
}

void fail_on_logits(std::span<const float> logits) {
  for (std::size_t id = 0; id < logits.size(); ++id) {
    require(!std::isnan(logits[id]), "[sampling] the logit of id ", id, " is NaN");
    require(!(logits[id] > std::numeric_limits<float>::max()), "[sampling] the logit of id ", id,
            " is infinite");
  }
  fail(ErrorKind::invalid_argument, "[sampling] all ", logits.size(),
       " logits are -infinity: no token can be drawn");
}

bool is_argmax(const SamplingOptions& options) { return options.top_k == 1 || options.temperature == 0.0; }

bool has_penalty(const SamplingOptions& options, std::span<const std::int64_t> previous) {
  return options.repetition_penalty != 1.0 && !previous.empty();
}

bool has_top_p(double p) { return p > 0.0 && p < 1.0; }

float min_p_threshold(float largest, double min_p) {
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  if (min_p <= 0.0) return kLowest;
  // In f64, rounded up to the next float: then logit >= threshold says exactly what the f64 rule says.
  const double exact = static_cast<double>(largest) + std::log(min_p);
  if (exact <= static_cast<double>(kLowest)) return kLowest;
  const auto rounded = static_cast<float>(exact);
  return static_cast<double>(rounded) < exact ? std::nextafter(rounded, largest) : rounded;
}

}  // namespace sampling

void validate(const SamplingOptions& options) {
  require(options.temperature >= 0.0 && std::isfinite(options.temperature), "temperature is ",
          options.temperature, ", expected a number from 0 up");
  require(options.top_k >= 0, "top_k is ", options.top_k, ", expected 0 (off) or more");
  require(!std::isnan(options.top_p), "top_p is NaN, expected a number");
  require(options.min_p >= 0.0 && options.min_p <= 1.0, "min_p is ", options.min_p, ", expected 0 to 1");
  require(options.repetition_penalty > 0.0 && std::isfinite(options.repetition_penalty),
          "repetition_penalty is ", options.repetition_penalty, ", expected a number above 0");
}

void apply_repetition_penalty(std::span<float> logits, std::span<const std::int64_t> previous,
                              double penalty) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  std::vector<bool> seen(logits.size());
  for (const std::int64_t id : previous) {
    require(id >= 0 && static_cast<std::uint64_t>(id) < logits.size(), "[sampling] previous id ", id,
            " is outside of the ", logits.size(), " logits");
    const auto at = static_cast<std::size_t>(id);
    if (seen[at]) continue;
    seen[at] = true;
    float& score = logits[at];
    if (!std::isfinite(score)) continue;
    const double scaled = score < 0 ? score * penalty : score / penalty;
    // A finite score stays one, however large the penalty.
    score = static_cast<float>(std::clamp<double>(scaled, -kLargest, kLargest));
  }
}

void filter_top_k(std::span<float> logits, std::int64_t k) {
  require(k >= 0, "top_k is ", k, ", expected 0 (off) or more");
  if (k == 0 || static_cast<std::uint64_t>(k) >= logits.size()) return;
  drop_from(logits, ranking(logits), static_cast<std::size_t>(k));
}

void filter_top_p(std::span<float> logits, double p) { keep_top_p(logits, p, 1.0); }

void filter_min_p(std::span<float> logits, double p) {
  require(p >= 0.0 && p <= 1.0, "min_p is ", p, ", expected 0 to 1");
  if (p == 0.0 || logits.empty()) return;
  const float threshold = sampling::min_p_threshold(*std::max_element(logits.begin(), logits.end()), p);
  for (float& logit : logits)
    if (logit < threshold) logit = kDropped;
}

std::vector<float> softmax(std::span<const float> logits) { return normalised(exponentials(logits, 1.0)); }

std::vector<float> sampling_distribution(std::span<const float> logits, std::int64_t vocab_size,
                                         std::span<const std::int64_t> previous,
                                         const SamplingOptions& options) {
  sampling::check_arguments(logits, vocab_size, options);
  const auto count = static_cast<std::size_t>(vocab_size);
  std::vector<float> scores(logits.begin(), logits.end());
  for (const float logit : logits.first(count))
    if (!(logit <= std::numeric_limits<float>::max())) sampling::fail_on_logits(logits.first(count));
  if (sampling::has_penalty(options, previous))
    apply_repetition_penalty(scores, previous, options.repetition_penalty);

  const std::span<float> kept = std::span(scores).first(count);
  const auto best = std::max_element(kept.begin(), kept.end());
  if (*best == kDropped) sampling::fail_on_logits(logits.first(count));
  std::vector<float> probabilities;
  if (sampling::is_argmax(options)) {
    probabilities.resize(count);
    probabilities[static_cast<std::size_t>(best - kept.begin())] = 1.0F;
  } else {
    if (options.top_k > 0)
      filter_top_k(kept, options.top_k);
    else
      filter_min_p(kept, options.min_p);
    keep_top_p(kept, options.top_p, options.temperature);
    probabilities = normalised(exponentials(kept, options.temperature));
  }
  probabilities.resize(logits.size());
  return probabilities;
}

}  // namespace krait
