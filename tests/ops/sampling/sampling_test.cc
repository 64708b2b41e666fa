#include "krait/ops/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "krait/core/error.h"
#include "ops/random_tensors.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::coin;
using testing::golden_array;
using testing::message_of;
using testing::on_each_target;
using testing::pick;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> golden_row(const std::string& name, std::int64_t row) {
  const Tensor t = golden_array("sampler", name).to(DType::f32).select(0, row).contiguous();
  return {t.span<float>().begin(), t.span<float>().end()};
}

void expect_near(const std::vector<float>& found, const std::vector<float>& expected,
                 const std::string& what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  for (std::size_t i = 0; i < found.size(); ++i)
    ASSERT_NEAR(found[i], expected[i], 1e-6) << what << " id " << i;
}

TEST(Sampling, Goldens) {
  for (std::int64_t row = 0; row < 4; ++row) {
    SCOPED_TRACE(row);
    const std::vector<float> logits = golden_row("logits.npy", row);
    const std::vector<std::int64_t> previous = testing::row_of(golden_array("sampler", "prev.npy"), row);
    const auto vocab = static_cast<std::int64_t>(logits.size());

    std::vector<float> penalised = logits;
    apply_repetition_penalty(penalised, previous, 1.3);
    expect_near(penalised, golden_row("rep_penalty_1.3.npy", row), "penalty");

    for (const std::int64_t k : {40, 5}) {
      std::vector<float> kept = logits;
      filter_top_k(kept, k);
      const auto expected = golden_row(concat("top_k_", k, ".npy"), row);
      expect_near(softmax(kept), expected, "filter_top_k");
      expect_near(sampling_distribution(logits, vocab, {}, {.top_k = k}), expected, "top_k");
    }
    for (const double p : {0.5, 0.9}) {
      std::vector<float> kept = logits;
      filter_top_p(kept, p);
      const auto expected = golden_row(concat("top_p_", p, ".npy"), row);
      expect_near(softmax(kept), expected, "filter_top_p");
      expect_near(sampling_distribution(logits, vocab, {}, {.top_p = p}), expected, "top_p");
    }
    expect_near(sampling_distribution(logits, vocab, {}, {.temperature = 0.7, .top_k = 40, .top_p = 0.9}),
                golden_row("top_k_40_temp_0.7_top_p_0.9.npy", row), "all");
  }
}

TEST(Sampling, PenaltyAppliesOncePerId) {
  std::vector<float> logits{2.0F, -2.0F, 0.0F, 6.0F, -kInfinity};
  const std::vector<std::int64_t> previous{0, 1, 0, 0, 1, 4};
  apply_repetition_penalty(logits, previous, 2.0);
  EXPECT_EQ(logits, (std::vector<float>{1.0F, -4.0F, 0.0F, 6.0F, -kInfinity}));
}

TEST(Sampling, FiltersKeepTiesByIdOrder) {
  const std::vector<float> ties{1.0F, 2.0F, 2.0F, 2.0F, 1.0F};
  std::vector<float> kept = ties;
  filter_top_k(kept, 2);
  EXPECT_EQ(kept, (std::vector<float>{-kInfinity, 2.0F, 2.0F, -kInfinity, -kInfinity}));
  kept.assign(4, 0.0F);
  filter_top_p(kept, 0.5);  // two of four equal tokens reach 0.5 exactly
  EXPECT_EQ(kept, (std::vector<float>{0.0F, 0.0F, -kInfinity, -kInfinity}));
  kept.assign(4, 0.0F);
  filter_top_p(kept, 0.51);
  EXPECT_EQ(kept, (std::vector<float>{0.0F, 0.0F, 0.0F, -kInfinity}));
}

TEST(Sampling, FiltersThatAreOff) {
  const std::vector<float> logits{1.0F, 3.0F, 2.0F};
  for (const double p : {0.0, -1.0, 1.0, 2.0}) {
    std::vector<float> kept = logits;
    filter_top_p(kept, p);
    EXPECT_EQ(kept, logits) << p;
  }
  for (const std::int64_t k : {0, 3, 99}) {
    std::vector<float> kept = logits;
    filter_top_k(kept, k);
    EXPECT_EQ(kept, logits) << k;
  }
}

TEST(Sampling, MinPComparesWithTheLargest) {
  // Probabilities relative to the largest: 1, 1/2, 1/4.
  const std::vector<float> logits{0.0F, std::log(2.0F), std::log(4.0F)};
  std::vector<float> kept = logits;
  filter_min_p(kept, 0.4);
  EXPECT_EQ(kept, (std::vector<float>{-kInfinity, logits[1], logits[2]}));
  kept = logits;
  filter_min_p(kept, 1.0);
  EXPECT_EQ(kept, (std::vector<float>{-kInfinity, -kInfinity, logits[2]}));
  // min_p comes before temperature: a hot distribution keeps the same tokens.
  const auto hot = sampling_distribution(logits, 3, {}, {.temperature = 100.0, .min_p = 0.4});
  EXPECT_EQ(hot[0], 0.0F);
  EXPECT_NEAR(hot[1], 0.5, 0.01);
  // And is ignored with top_k.
  EXPECT_GT(sampling_distribution(logits, 3, {}, {.top_k = 3, .min_p = 0.9})[0], 0.1F);
}

TEST(Sampling, TopPComesAfterTemperature) {
  const std::vector<float> logits{0.0F, 1.0F, 2.0F, 3.0F};
  // Cold: the best token alone has 0.9. Hot: it takes three.
  const auto cold = sampling_distribution(logits, 4, {}, {.temperature = 0.25, .top_p = 0.7});
  EXPECT_EQ(std::count_if(cold.begin(), cold.end(), [](float p) { return p > 0; }), 1);
  const auto hot = sampling_distribution(logits, 4, {}, {.temperature = 10.0, .top_p = 0.7});
  EXPECT_EQ(std::count_if(hot.begin(), hot.end(), [](float p) { return p > 0; }), 3);
}

// A language model's row: most of the mass on few tokens, with ties.
std::vector<float> random_logits(Rng& rng, std::int64_t vocab, double spread) {
  std::vector<float> logits(static_cast<std::size_t>(vocab));
  const bool ties = coin(rng, 0.3);
  for (float& logit : logits) {
    logit = static_cast<float>(spread * static_cast<double>(rng.normal()));
    if (ties) logit = std::round(2.0F * logit) / 2.0F;
    if (coin(rng, 0.02)) logit = -kInfinity;
  }
  logits[static_cast<std::size_t>(pick(rng, 0, vocab - 1))] = 1.0F;
  return logits;
}

SamplingOptions random_options(Rng& rng, std::int64_t vocab) {
  SamplingOptions options;
  if (coin(rng)) options.temperature = 0.1 + 2.0 * rng.uniform_double();
  if (coin(rng)) options.top_k = pick(rng, 0, std::min<std::int64_t>(coin(rng) ? 60 : vocab + 2, 5000));
  if (coin(rng)) options.top_p = rng.uniform_double();
  if (coin(rng, 0.3)) options.min_p = 0.3 * rng.uniform_double();
  if (coin(rng, 0.3)) options.repetition_penalty = 0.7 + rng.uniform_double();
  return options;
}

// `sample` returns what its definition says: the first id whose cumulative probability exceeds the number
// that the generator gives next. The two sums differ by rounding, so that u may lie between neighbours.
TEST(Sampling, DrawsFromTheDistribution) {
  on_each_target([] {
    Rng rng(31);
    for (int trial = 0; trial < 400; ++trial) {
      const std::int64_t rows = coin(rng, 0.1) ? 20000 : pick(rng, 1, 3000);
      const std::int64_t vocab = std::max<std::int64_t>(1, rows - pick(rng, 0, 20));
      std::vector<float> logits = random_logits(rng, rows, coin(rng) ? 3.0 : 0.5);
      logits[0] = 0.25F;  // at least one finite logit below vocab
      for (std::size_t i = static_cast<std::size_t>(vocab); i < logits.size(); ++i) logits[i] = 50.0F;
      std::vector<std::int64_t> previous;
      for (int i = 0; i < 30; ++i) previous.push_back(pick(rng, 0, rows - 1));
      const SamplingOptions options = random_options(rng, vocab);
      SCOPED_TRACE(concat("trial ", trial, " V ", vocab, " temperature ", options.temperature, " top_k ",
                          options.top_k, " top_p ", options.top_p, " min_p ", options.min_p, " penalty ",
                          options.repetition_penalty));
      const auto probabilities = sampling_distribution(logits, vocab, previous, options);
      ASSERT_NEAR(std::accumulate(probabilities.begin(), probabilities.end(), 0.0), 1.0, 1e-5);
      for (int draw = 0; draw < 10; ++draw) {
        const auto seed = static_cast<std::uint64_t>(trial * 10 + draw);
        Rng numbers(seed);
        const Sample found = sample(logits, vocab, previous, options, numbers);
        Rng again(seed);
        const double u = options.top_k == 1 ? 0.0 : again.uniform_double();
        EXPECT_EQ(numbers.position(), again.position());
        ASSERT_GE(found.id, 0);
        ASSERT_LT(found.id, vocab);
        const auto id = static_cast<std::size_t>(found.id);
        ASSERT_GT(probabilities[id], 0.0F) << found.id;
        const double before = std::accumulate(probabilities.begin(), probabilities.begin() + found.id, 0.0);
        EXPECT_GE(u, before - 2e-5) << found.id;
        EXPECT_LE(u, before + static_cast<double>(probabilities[id]) + 2e-5) << found.id;

        double total = 0.0;
        for (std::size_t i = 0; i < static_cast<std::size_t>(vocab); ++i)
          total += std::exp(static_cast<double>(logits[i]));
        EXPECT_NEAR(found.logprob, static_cast<double>(logits[id]) - std::log(total), 3e-6);
        if (::testing::Test::HasFailure()) return;
      }
    }
  });
}

// Counts over many draws, within five standard deviations. The seeds are fixed.
TEST(Sampling, FrequenciesMatchTheDistribution) {
  Rng rng(32);
  const std::vector<float> logits = random_logits(rng, 60, 2.0);
  for (const SamplingOptions& options :
       {SamplingOptions{}, SamplingOptions{.temperature = 0.8, .top_k = 10}, SamplingOptions{.top_p = 0.8},
        SamplingOptions{.temperature = 1.5, .min_p = 0.1}}) {
    const auto probabilities = sampling_distribution(logits, 60, {}, options);
    constexpr int kDraws = 50000;
    std::vector<int> counts(logits.size());
    for (int i = 0; i < kDraws; ++i)
      ++counts[static_cast<std::size_t>(sample(logits, 60, {}, options, rng).id)];
    for (std::size_t id = 0; id < counts.size(); ++id) {
      const double p = static_cast<double>(probabilities[id]);
      EXPECT_NEAR(counts[id], kDraws * p, 5.0 * std::sqrt(kDraws * p * (1.0 - p)) + 1e-9) << "id " << id;
    }
  }
}

TEST(Sampling, ArgmaxTakesTheSmallestIdAndDrawsNothing) {
  const std::vector<float> logits{0.0F, 5.0F, 1.0F, 5.0F, 9.0F};
  for (const SamplingOptions& options : {SamplingOptions{.top_k = 1}, SamplingOptions{.temperature = 0.0},
                                         SamplingOptions{.temperature = 0.0, .top_p = 0.5}}) {
    Rng rng(1);
    EXPECT_EQ(sample(logits, 4, {}, options, rng).id, 1);
    EXPECT_EQ(rng.position(), 0U);
    EXPECT_EQ(sampling_distribution(logits, 4, {}, options), (std::vector<float>{0, 1, 0, 0, 0}));
  }
  // The penalty comes before the argmax; the logprob is that of the raw logits.
  Rng rng(1);
  const std::vector<std::int64_t> previous{1};
  const Sample second = sample(logits, 4, previous, {.top_k = 1, .repetition_penalty = 2.0}, rng);
  EXPECT_EQ(second.id, 3);
  EXPECT_NEAR(second.logprob, 5.0 - std::log(1.0 + std::exp(1.0) + 2.0 * std::exp(5.0)), 1e-6);
}

TEST(Sampling, SameSeedSameIds) {
  Rng noise(33);
  const std::vector<float> logits = random_logits(noise, 5000, 2.0);
  const SamplingOptions options{.temperature = 0.9, .top_p = 0.95};
  Rng a(7, 2);
  Rng b(7, 2);
  std::vector<std::int64_t> ids;
  for (int i = 0; i < 100; ++i) {
    const std::int64_t id = sample(logits, 5000, {}, options, a).id;
    EXPECT_EQ(sample(logits, 5000, {}, options, b).id, id);
    ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  EXPECT_GT(std::unique(ids.begin(), ids.end()) - ids.begin(), 20);
}

TEST(Sampling, ManyEqualLogits) {
  const std::vector<float> logits(5000, -3.0F);
  Rng rng(34);
  for (int i = 0; i < 200; ++i) {
    EXPECT_LT(sample(logits, 5000, {}, {.top_p = 0.5}, rng).id, 2500);
    EXPECT_LT(sample(logits, 5000, {}, {.top_k = 300}, rng).id, 300);
  }
}

TEST(Sampling, Extremes) {
  Rng rng(35);
  constexpr float kLargest = std::numeric_limits<float>::max();
  const std::vector<float> wide{-kLargest, kLargest, -kInfinity, 0.0F};
  for (const double temperature : {1e-300, 1e-30, 1.0, 1e30, 1e300})
    for (const SamplingOptions& options :
         {SamplingOptions{.temperature = temperature},
          SamplingOptions{.temperature = temperature, .top_p = 0.9},
          SamplingOptions{.temperature = temperature, .top_k = 2},
          SamplingOptions{.temperature = temperature, .min_p = 0.1, .repetition_penalty = 1e30}}) {
      SCOPED_TRACE(concat(temperature, " top_p ", options.top_p, " top_k ", options.top_k));
      const std::vector<std::int64_t> previous{0, 1};
      const Sample found = sample(wide, 4, previous, options, rng);
      EXPECT_NE(found.id, 2);
      EXPECT_FALSE(std::isnan(found.logprob));
    }
  const std::vector<float> single{-7.0F};
  EXPECT_EQ(sample(single, 1, {}, {.top_k = 5, .top_p = 0.1}, rng).id, 0);
  EXPECT_NEAR(sample(single, 1, {}, {}, rng).logprob, 0.0, 1e-7);
}

TEST(Sampling, BadLogits) {
  for (const auto& [logits, message] :
       {std::pair<std::vector<float>, std::string>{{0.0F, kNan, 1.0F}, "[sampling] the logit of id 1 is NaN"},
        {{0.0F, 1.0F, kInfinity}, "[sampling] the logit of id 2 is infinite"},
        {{-kInfinity, -kInfinity}, "[sampling] all 2 logits are -infinity: no token can be drawn"}}) {
    const auto vocab = static_cast<std::int64_t>(logits.size());
    for (const SamplingOptions& options : {SamplingOptions{}, SamplingOptions{.top_k = 1},
                                           SamplingOptions{.top_k = 2}, SamplingOptions{.top_p = 0.5}}) {
      Rng rng(1);
      EXPECT_EQ(message_of([&] { (void)sample(logits, vocab, {}, options, rng); }), message);
      EXPECT_EQ(message_of([&] { (void)sampling_distribution(logits, vocab, {}, options); }), message);
      EXPECT_EQ(rng.position(), 0U);
    }
  }
  // In the middle of a long row, where vectors are scanned; and behind the vocabulary, where nobody looks.
  Rng rng(1);
  std::vector<float> logits(1000, 0.0F);
  logits[517] = kNan;
  EXPECT_EQ(message_of([&] { (void)sample(logits, 1000, {}, {}, rng); }),
            "[sampling] the logit of id 517 is NaN");
  EXPECT_LT(sample(logits, 517, {}, {}, rng).id, 517);
}

TEST(Sampling, OptionsOutOfRange) {
  const std::vector<float> logits{0.0F, 1.0F};
  Rng rng(1);
  for (const auto& [options, message] : {
           std::pair<SamplingOptions, std::string>{{.temperature = -0.5},
                                                   "temperature is -0.5, expected a number from 0 up"},
           {{.temperature = NAN}, "temperature is nan, expected a number from 0 up"},
           {{.top_k = -1}, "top_k is -1, expected 0 (off) or more"},
           {{.top_p = NAN}, "top_p is NaN, expected a number"},
           {{.min_p = 1.5}, "min_p is 1.5, expected 0 to 1"},
           {{.repetition_penalty = 0.0}, "repetition_penalty is 0, expected a number above 0"},
       }) {
    EXPECT_EQ(message_of([&] { validate(options); }), message);
    EXPECT_EQ(message_of([&] { (void)sample(logits, 2, {}, options, rng); }), message);
  }
  EXPECT_EQ(message_of([&] { (void)sample(logits, 3, {}, {}, rng); }),
            "[sampling] vocab_size is 3, expected 1 to 2, the number of logits");
  EXPECT_NE(message_of([&] { (void)sample({}, 0, {}, {}, rng); }), "");
  const std::vector<std::int64_t> previous{2};
  EXPECT_EQ(message_of([&] { (void)sample(logits, 2, previous, {.repetition_penalty = 1.1}, rng); }),
            "[sampling] previous id 2 is outside of the 2 logits");
}

}  // namespace
}  // namespace krait
