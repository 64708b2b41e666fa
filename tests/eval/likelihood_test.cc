#include "krait/eval/likelihood.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "core/on_device.h"
#include "io/scratch.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden;
using Ids = std::vector<std::int64_t>;

// From the logits of one sequence at a time.
std::vector<Likelihood> expected(Context& ctx, const LanguageModel& model,
                                 const std::vector<Continuation>& continuations, std::size_t max_length) {
  std::vector<Likelihood> out;
  for (const auto& [context, continuation] : continuations) {
    Ids ids = context;
    ids.insert(ids.end(), continuation.begin(), continuation.end());
    if (ids.size() > max_length + 1)
      ids.erase(ids.begin(), ids.end() - static_cast<std::ptrdiff_t>(max_length) - 1);
    State state = model.new_state();
    const Tensor logits =
        ctx.to_host(model.logits(ctx, std::span(ids).first(ids.size() - 1), state, LogitRows::all));
    Likelihood& result = out.emplace_back(Likelihood{.log_likelihood = 0.0, .is_greedy = true});
    for (std::size_t t = ids.size() - continuation.size(); t < ids.size(); ++t) {
      const Tensor row = logits.select(0, static_cast<std::int64_t>(t) - 1);
      double total = 0.0;
      for (const float x : row.span<float>()) total += std::exp(static_cast<double>(x));
      const float* at = row.data<float>() + ids[t];
      result.log_likelihood += static_cast<double>(*at) - std::log(total);
      result.is_greedy &= at == std::ranges::max_element(row.span<float>()).base();
    }
  }
  return out;
}

void expect_near(const std::vector<Likelihood>& found, const std::vector<Likelihood>& wanted) {
  ASSERT_EQ(found.size(), wanted.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    EXPECT_NEAR(found[i].log_likelihood, wanted[i].log_likelihood, 1e-4) << i;
    EXPECT_EQ(found[i].is_greedy, wanted[i].is_greedy) << i;
  }
}

class LikelihoodTest : public ::testing::TestWithParam<const char*> {
 protected:
  LikelihoodTest()
      : ctx_(ContextOptions{.device = testing::test_device()}),
        model_(load_language_model(ctx_, open_model_directory(golden(GetParam())))) {}

  static Ids draw(std::mt19937& random, std::size_t length) {
    Ids ids(length);
    for (std::int64_t& id : ids) id = random() % 277;
    return ids;
  }
  // What the model itself goes on with.
  Ids greedy(const Ids& context, std::size_t length) {
    State state = model_.new_state();
    Ids out;
    Tensor logits = model_.logits(ctx_, context, state);
    while (out.size() < length) {
      const Tensor row = ctx_.to_host(logits);
      const auto all = row.span<float>();
      out.push_back(std::ranges::max_element(all) - all.begin());
      logits = model_.logits(ctx_, std::span(&out.back(), 1), state);
    }
    return out;
  }
  // A beginning that all share, documents behind it, and choices behind those.
  std::vector<Continuation> continuations() {
    std::mt19937 random(3);
    std::vector<Continuation> out;
    const Ids examples = draw(random, 70);
    for (int document = 0; document < 3; ++document) {
      Ids context = examples;
      for (const std::int64_t id : draw(random, 12)) context.push_back(id);
      const Ids common = draw(random, 9);
      for (int choice = 0; choice < 3; ++choice) {
        Ids continuation = common;
        for (const std::int64_t id : draw(random, static_cast<std::size_t>(choice)))
          continuation.push_back(id);
        out.push_back({.context = context, .continuation = continuation});
      }
      out.push_back({.context = context, .continuation = greedy(context, 4)});
      // Equal inputs that differ in the token that is predicted last alone, and where continuations begin.
      for (const std::int64_t id : {5, 6, 7}) out.push_back({.context = context, .continuation = {id}});
      context.insert(context.end(), common.begin(), common.begin() + 4);
      out.push_back({.context = context, .continuation = Ids(common.begin() + 4, common.end())});
    }
    out.push_back({.context = {0}, .continuation = {1}});
    out.push_back({.context = {0}, .continuation = draw(random, 700)});  // longer than a pass on a CPU
    return out;
  }

  Context ctx_;
  LanguageModel model_;
};

TEST_P(LikelihoodTest, IsThatOfTheLogits) {
  const auto all = continuations();
  const auto wanted = expected(ctx_, model_, all, 4096);
  EXPECT_TRUE(wanted[3].is_greedy);
  for (const bool share : {true, false})
    for (const std::int64_t batch_size : {0, 1, 5}) {
      SCOPED_TRACE(concat(share, " ", batch_size));
      expect_near(likelihoods(ctx_, model_, all, {.batch_size = batch_size, .share_prefixes = share}),
                  wanted);
    }
}

TEST_P(LikelihoodTest, LongContextsLoseTheirBeginning) {
  auto all = continuations();
  all.pop_back();
  expect_near(likelihoods(ctx_, model_, all, {.max_length = 16}), expected(ctx_, model_, all, 16));
}

TEST_P(LikelihoodTest, CountsWhatIsDone) {
  const auto all = continuations();
  std::vector<std::int64_t> seen;
  likelihoods(ctx_, model_, all, {.batch_size = 4, .progress = [&](std::int64_t done, std::int64_t total) {
                                    EXPECT_EQ(total, std::ssize(all));
                                    seen.push_back(done);
                                  }});
  EXPECT_GT(seen.size(), 2U);
  EXPECT_TRUE(std::ranges::is_sorted(seen));
  EXPECT_EQ(seen.back(), std::ssize(all));
}

TEST_P(LikelihoodTest, RefusesWhatCannotBe) {
  const auto one = [&](const Ids& context, const Ids& continuation, const LikelihoodOptions& options = {}) {
    const std::vector<Continuation> all{{.context = {1}, .continuation = {2}},
                                        {.context = context, .continuation = continuation}};
    return likelihoods(ctx_, model_, all, options);
  };
  EXPECT_MESSAGE(one({}, {1}), "context of continuation 1 has no tokens");
  EXPECT_MESSAGE(one({1}, {}), "continuation 1 has no tokens");
  EXPECT_MESSAGE(one({1}, {1, 2, 3}, {.max_length = 2}), "has 3 tokens, expected at most max_length = 2");
  EXPECT_MESSAGE(one({1}, {100000}), "id 100000 in continuation 1, expected 0 to vocab_size - 1 = ");
  EXPECT_MESSAGE(one({-1}, {1}), "id -1 in continuation 1");
  EXPECT_MESSAGE(one({1}, {1}, {.batch_size = -1}), "batch_size is -1");
  EXPECT_TRUE(likelihoods(ctx_, model_, {}).empty());
}

INSTANTIATE_TEST_SUITE_P(Models, LikelihoodTest,
                         ::testing::Values("mamba1-tiny", "mamba2-tiny", "mamba2attn-tiny",
                                           "transformerpp-tiny", "hf-gptneox-tiny"),
                         [](const auto& model) {
                           std::string name = model.param;
                           std::erase(name, '-');
                           return name;
                         });

// Attention that looks ahead: what is in front of a token depends on what is behind it.
TEST(LikelihoodOfBidirectionalAttention, SharesNothing) {
  Context ctx;
  ModelConfig config = read_config(open_model_directory(golden("mamba2attn-tiny")));
  config.attn.causal = false;
  LanguageModel model(config);
  model.initialize(1);
  Ids context(20, 3);
  const std::vector<Continuation> all{{.context = context, .continuation = {4, 5, 6}},
                                      {.context = context, .continuation = {9, 8}}};
  expect_near(likelihoods(ctx, model, all), expected(ctx, model, all, 100));
}

TEST(ChooseBatchSize, BoundsTheMemoryOfStates) {
  EXPECT_EQ(choose_batch_size(1000), 64);
  EXPECT_EQ(choose_batch_size(std::size_t{100} << 20U), 20);
  EXPECT_EQ(choose_batch_size(std::size_t{100} << 30U), 1);
  EXPECT_EQ(choose_batch_size(0), 64);
}

// The example of the harness's documentation, and its other cases.
TEST(RollingWindows, PredictEachTokenOnce) {
  const auto windows = [](std::int64_t count, std::int64_t length) {
    Ids ids(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) ids[static_cast<std::size_t>(i)] = i;
    std::vector<std::pair<Ids, Ids>> out;
    for (const auto& [context, continuation] : rolling_windows(ids, 99, length))
      out.emplace_back(context, continuation);
    return out;
  };
  using Windows = std::vector<std::pair<Ids, Ids>>;
  EXPECT_EQ(windows(10, 4), (Windows{{{99}, {0, 1, 2, 3}}, {{3}, {4, 5, 6, 7}}, {{5, 6, 7}, {8, 9}}}));
  EXPECT_EQ(windows(4, 4), (Windows{{{99}, {0, 1, 2, 3}}}));
  EXPECT_EQ(windows(3, 4), (Windows{{{99}, {0, 1, 2}}}));
  EXPECT_EQ(windows(2, 1), (Windows{{{99}, {0}}, {{0}, {1}}}));
  EXPECT_EQ(windows(0, 4), Windows{});
  EXPECT_MESSAGE(rolling_windows({}, 0, 0), "max_length is 0");
}

}  // namespace
}  // namespace krait
