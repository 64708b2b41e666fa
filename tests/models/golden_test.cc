// Whole models against logits and greedy text that upstream and transformers computed.
#include <gtest/gtest.h>

#include <algorithm>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/models/load.h"
#include "krait/models/stepper.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden;
using testing::golden_array;
using testing::max_difference;
using testing::row_of;

constexpr double kTolerance = 5e-4;

class Golden : public ::testing::TestWithParam<const char*> {
 protected:
  Golden() : model_(load_language_model(ctx_, open_model_directory(golden(GetParam())))) {}

  std::vector<std::int64_t> greedy(const std::vector<std::int64_t>& prompt, std::size_t length) {
    std::vector<std::int64_t> ids = prompt;
    State state = model_.new_state();
    State* const states[] = {&state};
    Stepper stepper(ctx_, model_);
    Tensor logits = ctx_.to_host(model_.logits(ctx_, ids, state));
    while (ids.size() < length) {
      const float* row = logits.data<float>();
      ids.push_back(std::max_element(row, row + model_.config().vocab_size) - row);
      logits = ctx_.to_host(stepper.step(std::span(ids).last(1), states));
    }
    return ids;
  }

  // Logits of every token, taken in pieces whose lengths `next` gives.
  template <typename Next>
  Tensor in_pieces(const std::vector<std::int64_t>& ids, const Next& next) {
    Tensor all = Tensor::empty({static_cast<std::int64_t>(ids.size()), model_.config().padded_vocab_size()});
    State state = model_.new_state();
    for (std::size_t at = 0; at < ids.size();) {
      const std::size_t n = std::min<std::size_t>(next(), ids.size() - at);
      const Tensor part =
          ctx_.to_host(model_.logits(ctx_, std::span(ids).subspan(at, n), state, LogitRows::all));
      all.slice(0, static_cast<std::int64_t>(at), static_cast<std::int64_t>(at + n)).copy_from(part);
      at += n;
    }
    EXPECT_EQ(state.position(), static_cast<std::int64_t>(ids.size()));
    return all;
  }

  Context ctx_{ContextOptions{.device = testing::test_device()}};
  LanguageModel model_;
};

TEST_P(Golden, LogitsInOnePassStepByStepAndInRandomSplits) {
  const Tensor ids = golden_array(GetParam(), "input_ids.npy");
  const Tensor want = golden_array(GetParam(), "logits.npy");
  Rng rng(7);
  for (std::int64_t b = 0; b < ids.size(0); ++b) {
    const auto row = row_of(ids, b);
    EXPECT_LT(max_difference(in_pieces(row, [&] { return row.size(); }), want.select(0, b)), kTolerance);
    EXPECT_LT(max_difference(in_pieces(row, [] { return 1; }), want.select(0, b)), kTolerance);
    for (int split = 0; split < 4; ++split)
      EXPECT_LT(max_difference(in_pieces(row, [&] { return 1 + rng.next_u32() % 24; }), want.select(0, b)),
                kTolerance);
  }
}

TEST_P(Golden, ReferencePathAgrees) {
  if (testing::on_gpu()) GTEST_SKIP() << "the reference runs on the CPU";
  ctx_.set_reference(true);
  const Tensor ids = golden_array(GetParam(), "input_ids.npy");
  const auto row = row_of(ids, 0);
  EXPECT_LT(
      max_difference(in_pieces(row, [&] { return 40; }), golden_array(GetParam(), "logits.npy").select(0, 0)),
      kTolerance);
}

// Prompts of different lengths as one packed batch, from empty states and on top of states.
TEST_P(Golden, PackedBatchesEqualSingleSequences) {
  const Tensor ids = golden_array(GetParam(), "input_ids.npy");
  const Tensor want = golden_array(GetParam(), "logits.npy");
  std::vector<std::vector<std::int64_t>> prompts;
  for (const std::size_t length : {31, 1, 75, 8}) {
    auto row = row_of(ids, static_cast<std::int64_t>(prompts.size() % 2));
    row.resize(length);
    prompts.push_back(row);
  }
  std::vector<Sequence> sequences;
  for (const auto& p : prompts) sequences.push_back({.ids = p});
  const Tensor all = ctx_.to_host(model_.logits(ctx_, sequences, LogitRows::all));
  const Tensor last = ctx_.to_host(model_.logits(ctx_, sequences, LogitRows::last));
  std::int64_t at = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto length = static_cast<std::int64_t>(prompts[i].size());
    const Tensor expected = want.select(0, static_cast<std::int64_t>(i % 2)).slice(0, 0, length);
    EXPECT_LT(max_difference(all.slice(0, at, at + length), expected), kTolerance);
    EXPECT_LT(max_difference(last.select(0, static_cast<std::int64_t>(i)), expected.select(0, length - 1)),
              kTolerance);
    at += length;
  }

  // One step of all sequences together, out of order, so that their rows are not consecutive.
  const auto pool = model_.make_pool(1);
  std::vector<State> states;
  for (std::size_t i = 0; i < prompts.size(); ++i) states.emplace_back(pool);
  std::vector<Sequence> begun;
  for (const std::size_t i : {2U, 0U, 3U, 1U})
    if (prompts[i].size() > 1)
      begun.push_back({.ids = std::span(prompts[i]).first(prompts[i].size() - 1), .state = &states[i]});
  model_.logits(ctx_, begun);
  std::vector<Sequence> step;
  const std::vector<std::size_t> order{2, 0, 3, 1};
  for (const std::size_t i : order)
    step.push_back({.ids = std::span(prompts[i]).last(1), .state = &states[i]});
  const Tensor stepped = ctx_.to_host(model_.logits(ctx_, step));
  for (std::size_t k = 0; k < order.size(); ++k) {
    const std::size_t i = order[k];
    EXPECT_LT(max_difference(stepped.select(0, static_cast<std::int64_t>(k)),
                             want.select(0, static_cast<std::int64_t>(i % 2))
                                 .select(0, static_cast<std::int64_t>(prompts[i].size()) - 1)),
              kTolerance);
  }
}

TEST_P(Golden, GreedyText) {
  const Tensor prompts = golden_array(GetParam(), "prompt_ids.npy");
  const Tensor want = golden_array(GetParam(), "greedy_ids.npy");
  for (std::int64_t b = 0; b < prompts.size(0); ++b) {
    const auto expected = row_of(want, b);
    EXPECT_EQ(greedy(row_of(prompts, b), expected.size()), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, Golden,
                         ::testing::Values("mamba1-tiny", "mamba2-tiny", "mamba2attn-tiny",
                                           "transformerpp-tiny", "hf-mamba-tiny", "hf-mamba2-tiny",
                                           "hf-gptneox-tiny"),
                         [](const auto& param) {
                           std::string name = param.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

// Two sequences that step together, at first in one order, then in the other, then one alone, then one more
// that makes the pool grow: the recorded step must follow.
TEST_P(Golden, StepsOfChangingBatches) {
  const Tensor ids = golden_array(GetParam(), "input_ids.npy");
  const Tensor want = golden_array(GetParam(), "logits.npy");
  const std::vector<std::int64_t> rows[] = {row_of(ids, 0), row_of(ids, 1)};
  const auto pool = model_.make_pool(2);
  std::vector<State> states;
  states.reserve(3);
  std::vector<std::size_t> whose{0, 1};
  for (int i = 0; i < 2; ++i) states.emplace_back(pool);
  Stepper stepper(ctx_, model_);
  const auto step = [&](std::vector<std::size_t> order) {
    std::vector<std::int64_t> next;
    std::vector<State*> stepped;
    for (const std::size_t s : order) {
      next.push_back(rows[whose[s]][static_cast<std::size_t>(states[s].position())]);
      stepped.push_back(&states[s]);
    }
    const Tensor logits = ctx_.to_host(stepper.step(next, stepped));
    for (std::size_t i = 0; i < order.size(); ++i)
      EXPECT_LT(max_difference(logits.select(0, static_cast<std::int64_t>(i)),
                               want.select(0, static_cast<std::int64_t>(whose[order[i]]))
                                   .select(0, states[order[i]].position() - 1)),
                kTolerance)
          << "position " << states[order[i]].position();
  };
  for (int i = 0; i < 4; ++i) step({0, 1});
  for (int i = 0; i < 3; ++i) step({1, 0});
  for (int i = 0; i < 3; ++i) step({1});
  states.emplace_back(pool);
  whose.push_back(0);
  for (int i = 0; i < 4; ++i) step({2, 0});
  for (int i = 0; i < 4; ++i) step({1, 2, 0});
}

TEST(GoldenShakespeare, LogitsAndGreedyText) {
  Context ctx(ContextOptions{.device = testing::test_device()});
  const LanguageModel model =
      load_language_model(ctx, open_model_directory(golden("shakespeare")), {.dtype = DType::f32});
  const auto prompt = row_of(golden_array("shakespeare", "prompt_ids.npy"), 0);
  const Tensor want = golden_array("shakespeare", "prompt_logits.npy");
  State state = model.new_state();
  const Tensor logits = ctx.to_host(model.logits(ctx, prompt, state, LogitRows::all));
  EXPECT_LT(max_difference(logits, want.view({-1, want.size(-1)})), kTolerance);
}

}  // namespace
}  // namespace krait
