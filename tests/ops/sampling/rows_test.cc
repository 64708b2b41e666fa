#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/ops/sampling.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows of a language model: most of the mass on few tokens, some rows with ties.
Tensor random_logits(Rng& rng, std::int64_t rows, std::int64_t columns, double spread) {
  const Tensor logits = Tensor::empty({rows, columns});
  for (std::int64_t b = 0; b < rows; ++b) {
    const bool ties = coin(rng, 0.3);
    for (float& logit : logits.select(0, b).span<float>()) {
      logit = static_cast<float>(spread * static_cast<double>(rng.normal()));
      if (ties) logit = std::round(2.0F * logit) / 2.0F;
      if (coin(rng, 0.02)) logit = -kInfinity;
    }
    logits.data<float>()[b * columns] = 0.25F;
  }
  return logits;
}

SampleRowsArgs make_args(const Tensor& logits, std::int64_t vocab_size, const SamplingOptions& options) {
  const std::int64_t rows = logits.size(0);
  return {.logits = logits,
          .vocab_size = vocab_size,
          .options = options,
          .seed = 5,
          .positions = Tensor::zeros({rows}, DType::i64),
          .ids = Tensor::zeros({rows}, DType::i64),
          .logprobs = Tensor::zeros({rows})};
}

std::vector<float> row_of(const Tensor& t, std::int64_t row) {
  const Tensor wide = t.select(0, row).to(DType::f32).contiguous();
  return {wide.span<float>().begin(), wide.span<float>().end()};
}

int sum_of_marks(const Tensor& seen, std::int64_t row) {
  const auto marks = seen.select(0, row).span<std::uint8_t>();
  return std::accumulate(marks.begin(), marks.end(), 0);
}

// Each draw is the first id whose cumulative probability exceeds the number that the row's generator gives
// next, and all but a few, on borders between tokens, are the ids of `sample`.
TEST(SampleRows, DrawsFromTheDistributionOfEachRow) {
  Context ctx;
  Rng rng(41);
  int others = 0;
  for (int trial = 0; trial < 150; ++trial) {
    const std::int64_t rows = pick(rng, 1, 5);
    const std::int64_t columns = coin(rng, 0.1) ? pick(rng, 20000, 70000) : pick(rng, 1, 3000);
    const std::int64_t vocab = std::max<std::int64_t>(1, columns - pick(rng, 0, 20));
    const DType dtype = random_dtype(rng);
    Tensor logits = random_logits(rng, rows, columns, coin(rng) ? 3.0 : coin(rng) ? 0.5 : 0.01);
    logits = laid_out(logits.to(dtype), static_cast<int>(pick(rng, 0, 3)));
    SamplingOptions options;
    if (coin(rng)) options.temperature = 0.1 + 2.0 * rng.uniform_double();
    if (coin(rng)) options.top_k = pick(rng, 0, coin(rng) ? 60 : vocab + 2);
    if (coin(rng)) options.top_p = rng.uniform_double();
    if (coin(rng, 0.3)) options.min_p = 0.3 * rng.uniform_double();
    if (coin(rng, 0.3)) options.repetition_penalty = 0.7 + rng.uniform_double();
    SCOPED_TRACE(concat("trial ", trial, " rows ", rows, " V ", vocab, " of ", columns, " ", dtype,
                        " temperature ", options.temperature, " top_k ", options.top_k, " top_p ",
                        options.top_p, " min_p ", options.min_p, " penalty ", options.repetition_penalty));
    SampleRowsArgs args = make_args(logits, vocab, options);
    args.seed = static_cast<std::uint64_t>(trial);
    std::vector<std::int64_t> streams(static_cast<std::size_t>(rows));
    for (std::int64_t b = 0; b < rows; ++b) {
      streams[static_cast<std::size_t>(b)] = coin(rng) ? b : pick(rng, 0, 1 << 20) << 20;
      args.positions.data<std::int64_t>()[b] = pick(rng, 0, coin(rng) ? 9 : std::int64_t{1} << 40);
    }
    args.streams = Tensor::from(streams);
    args.seen = Tensor::zeros({rows, columns}, DType::u8);
    for (int i = 0; i < 30; ++i)
      args.seen.data<std::uint8_t>()[pick(rng, 0, rows - 1) * columns + pick(rng, 0, columns - 1)] = 1;
    const Tensor before = args.positions.clone();
    const Tensor seen = args.seen.clone();
    run(ctx, sample_rows, args);

    for (std::int64_t b = 0; b < rows; ++b) {
      std::vector<std::int64_t> previous;
      for (std::int64_t id = 0; id < columns; ++id)
        if (seen.data<std::uint8_t>()[b * columns + id] != 0) previous.push_back(id);
      const std::vector<float> row = row_of(logits, b);
      Rng numbers(args.seed, static_cast<std::uint64_t>(streams[static_cast<std::size_t>(b)]));
      numbers.set_position(static_cast<std::uint64_t>(before.data<std::int64_t>()[b]));
      Rng again = numbers;
      const Sample expected = sample(row, vocab, previous, options, numbers);
      const std::int64_t id = args.ids.data<std::int64_t>()[b];
      EXPECT_EQ(args.positions.data<std::int64_t>()[b], static_cast<std::int64_t>(numbers.position()));
      ASSERT_GE(id, 0);
      ASSERT_LT(id, vocab);
      EXPECT_EQ(args.seen.data<std::uint8_t>()[b * columns + id], 1);
      EXPECT_EQ(sum_of_marks(args.seen, b), static_cast<int>(previous.size()) +
                                                (seen.data<std::uint8_t>()[b * columns + id] == 0 ? 1 : 0));
      const double logprob = static_cast<double>(args.logprobs.data<float>()[b]);
      if (id == expected.id) {
        EXPECT_NEAR(logprob, static_cast<double>(expected.logprob), 5e-6);
        continue;
      }
      ++others;
      const auto probabilities = sampling_distribution(row, vocab, previous, options);
      const double u = again.uniform_double();
      const double sum = std::accumulate(probabilities.begin(), probabilities.begin() + id, 0.0);
      EXPECT_GT(probabilities[static_cast<std::size_t>(id)], 0.0F) << id;
      EXPECT_GE(u, sum - 2e-5) << id;
      EXPECT_LE(u, sum + static_cast<double>(probabilities[static_cast<std::size_t>(id)]) + 2e-5) << id;
    }
    if (HasFailure()) return;
  }
  EXPECT_LE(others, 3);
}

// Rows without a large memory of their own, and many equal logits.
TEST(SampleRows, LongRows) {
  Context ctx;
  const std::int64_t columns = 130'000;
  const Tensor logits = Tensor::empty({2, columns});
  logits.fill(-3.0);
  logits.data<float>()[columns + 77'777] = 4.0F;
  for (const SamplingOptions& options :
       {SamplingOptions{.top_p = 0.5}, SamplingOptions{.top_k = 65'000}, SamplingOptions{.top_k = 100},
        SamplingOptions{.top_k = 65'000, .top_p = 0.1}, SamplingOptions{}, SamplingOptions{.top_k = 1}}) {
    SCOPED_TRACE(concat("top_k ", options.top_k, " top_p ", options.top_p));
    const SampleRowsArgs args = make_args(logits, columns, options);
    run(ctx, sample_rows, args);
    for (std::int64_t b = 0; b < 2; ++b) {
      Rng numbers(args.seed, static_cast<std::uint64_t>(b));
      const Sample expected = sample(row_of(logits, b), columns, {}, options, numbers);
      EXPECT_NEAR(static_cast<double>(args.ids.data<std::int64_t>()[b]), static_cast<double>(expected.id),
                  1.0);
    }
  }
}

TEST(SampleRows, ArgmaxTakesTheSmallestIdAndDrawsNothing) {
  Context ctx;
  Rng rng(42);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    const Tensor logits = random_logits(rng, 4, 50'280, 2.0).to(dtype);
    for (const SamplingOptions& options :
         {SamplingOptions{.top_k = 1}, SamplingOptions{.temperature = 0.0}}) {
      SampleRowsArgs args = make_args(logits, 50'277, options);
      args.positions = {};
      run(ctx, sample_rows, args);
      for (std::int64_t b = 0; b < 4; ++b) {
        Rng none;
        const Sample expected = sample(row_of(logits, b), 50'277, {}, options, none);
        EXPECT_EQ(args.ids.data<std::int64_t>()[b], expected.id);
        EXPECT_NEAR(args.logprobs.data<float>()[b], expected.logprob, 5e-6);
      }
    }
  }
}

// One draw after another, all that changes being in the tensors.
TEST(SampleRows, GoesOnFromItsTensors) {
  Context ctx;
  Rng rng(43);
  const Tensor logits = random_logits(rng, 1, 500, 2.0);
  const SamplingOptions options{.temperature = 0.9, .top_p = 0.95, .repetition_penalty = 1.2};
  SampleRowsArgs args = make_args(logits, 500, options);
  args.seen = Tensor::zeros({1, 500}, DType::u8);
  Rng numbers(args.seed, 0);
  std::vector<std::int64_t> previous;
  for (int i = 0; i < 20; ++i) {
    run(ctx, sample_rows, args);
    previous.push_back(sample(row_of(logits, 0), 500, previous, options, numbers).id);
    ASSERT_EQ(args.ids.data<std::int64_t>()[0], previous.back()) << "draw " << i;
  }
}

TEST(SampleRows, Extremes) {
  Context ctx;
  constexpr float kLargest = std::numeric_limits<float>::max();
  const Tensor logits = Tensor::from<float>({-kLargest, kLargest, -kInfinity, 0.0F}, {1, 4});
  for (const double temperature : {1e-300, 1e-30, 1.0, 1e30, 1e300})
    for (const SamplingOptions& options :
         {SamplingOptions{.temperature = temperature},
          SamplingOptions{.temperature = temperature, .top_p = 0.9},
          SamplingOptions{.temperature = temperature, .top_k = 2},
          SamplingOptions{.temperature = temperature, .min_p = 0.1, .repetition_penalty = 1e30}}) {
      SCOPED_TRACE(concat(temperature, " top_p ", options.top_p, " top_k ", options.top_k));
      SampleRowsArgs args = make_args(logits, 4, options);
      args.seen = Tensor::from<std::uint8_t>({1, 1, 0, 0}, {1, 4});
      run(ctx, sample_rows, args);
      Rng numbers(args.seed, 0);
      const std::vector<std::int64_t> previous{0, 1};
      EXPECT_EQ(args.ids.data<std::int64_t>()[0],
                sample(row_of(logits, 0), 4, previous, options, numbers).id);
      EXPECT_FALSE(std::isnan(args.logprobs.data<float>()[0]));
    }
}

TEST(SampleRows, BadRowsAreMarkedOnAGpuAndAnErrorOnTheCpu) {
  Context ctx;
  const Tensor logits = Tensor::from<float>(
      {0.0F, NAN, 1.0F, 0.0F, 2.0F, 1.0F, 0.0F, 1.0F, kInfinity, -kInfinity, -kInfinity, -kInfinity}, {4, 3});
  for (const SamplingOptions& options : {SamplingOptions{}, SamplingOptions{.top_k = 1}}) {
    const SampleRowsArgs args = make_args(logits, 3, options);
    if (!on_gpu()) {
      EXPECT_EQ(message_of([&] { sample_rows(ctx, args); }), "[sampling] the logit of id 1 is NaN");
      continue;
    }
    run(ctx, sample_rows, args);
    for (const std::int64_t b : {0, 2, 3}) {
      EXPECT_EQ(args.ids.data<std::int64_t>()[b], -1) << b;
      EXPECT_EQ(args.positions.data<std::int64_t>()[b], 0) << b;
    }
    EXPECT_GE(args.ids.data<std::int64_t>()[1], 0);
  }
}

TEST(SampleRows, NamesWhatDoesNotFit) {
  Context ctx;
  const auto message = [&](const std::function<void(SampleRowsArgs&)>& change) {
    SampleRowsArgs args = make_args(Tensor::zeros({2, 5}), 5, {});
    change(args);
    return message_of([&] { sample_rows(ctx, args); });
  };
  EXPECT_EQ(message([](SampleRowsArgs&) {}), "");
  EXPECT_EQ(message([](SampleRowsArgs& a) { a.logits = Tensor::zeros({5}); }),
            "[sample_rows] logits has shape (5,), expected (B, V)");
  EXPECT_EQ(message([](SampleRowsArgs& a) { a.vocab_size = 6; }),
            "[sample_rows] vocab_size is 6, expected 1 to 5, the number of logits");
  EXPECT_EQ(message([](SampleRowsArgs& a) { a.ids = Tensor::zeros({2}, DType::i32); }),
            "[sample_rows] ids has shape (2,) and dtype i32, expected (2,) and i64");
  EXPECT_NE(message([](SampleRowsArgs& a) { a.positions = {}; }), "");
  EXPECT_EQ(message([](SampleRowsArgs& a) { a.options.repetition_penalty = 2.0; }),
            "[sample_rows] seen is absent, a repetition penalty needs it");
  EXPECT_EQ(message([](SampleRowsArgs& a) { a.options.temperature = -0.5; }),
            "temperature is -0.5, expected a number from 0 up");
}

}  // namespace
}  // namespace krait
