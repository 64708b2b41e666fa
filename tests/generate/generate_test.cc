#include "krait/generate/generate.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/models/load.h"
#include "krait/models/stepper.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden;
using testing::golden_array;
using testing::row_of;

class Generate : public ::testing::Test {
 protected:
  Generate()
      : files_(open_bundled_model()),
        model_(load_language_model(ctx_, files_)),
        tokenizer_(load_tokenizer(files_)) {}

  GenerateResult run(const std::vector<std::string>& texts, const GenerateOptions& options) {
    std::vector<std::vector<std::int64_t>> prompts;
    for (const auto& text : texts) prompts.push_back(tokenizer_.encode(text));
    return generate(ctx_, model_, &tokenizer_, prompts, options);
  }

  Context ctx_{ContextOptions{.device = testing::test_device()}};
  ModelFiles files_;
  LanguageModel model_;
  Tokenizer tokenizer_;
};

// With f32 weights the logits of a GPU differ in their last bits, and draws hardly ever.
TEST_F(Generate, AGpuDrawsWhatTheCpuDraws) {
  if (!testing::on_gpu()) GTEST_SKIP() << "needs a GPU";
  const auto texts_on = [&](Device device, const SamplingOptions& sampling) {
    Context ctx(ContextOptions{.device = device});
    const LanguageModel model =
        load_language_model(ctx, open_model_directory(golden("shakespeare")), {.dtype = DType::f32});
    const auto prompt = row_of(golden_array("shakespeare", "prompt_ids.npy"), 0);
    const std::vector<std::vector<std::int64_t>> prompts{
        prompt, {prompt.begin(), prompt.begin() + 2}, {prompt[0]}};
    const GenerateResult result =
        generate(ctx, model, nullptr, prompts,
                 {.max_new_tokens = 40, .sampling = sampling, .seed = 3, .ignore_eos = true});
    std::vector<std::vector<std::int64_t>> ids;
    for (const Generation& g : result.sequences) ids.push_back(g.ids);
    return ids;
  };
  for (const SamplingOptions& sampling :
       {SamplingOptions{.temperature = 0.0}, SamplingOptions{.temperature = 0.8, .top_p = 0.95},
        SamplingOptions{.temperature = 1.1, .top_k = 20, .repetition_penalty = 1.3},
        SamplingOptions{.temperature = 0.9, .min_p = 0.05}})
    EXPECT_EQ(texts_on(testing::test_device(), sampling), texts_on({}, sampling));
}

TEST_F(Generate, GreedyEqualsTheGolden) {
  Context ctx(ContextOptions{.device = testing::test_device()});
  const LanguageModel exact =
      load_language_model(ctx, open_model_directory(golden("shakespeare")), {.dtype = DType::f32});
  const auto want = row_of(golden_array("shakespeare", "greedy_ids.npy"), 0);
  const std::vector<std::vector<std::int64_t>> prompts{
      row_of(golden_array("shakespeare", "prompt_ids.npy"), 0)};
  const GenerateResult result =
      generate(ctx, exact, nullptr, prompts,
               {.max_new_tokens = static_cast<std::int64_t>(want.size() - prompts[0].size()),
                .sampling = {.temperature = 0.0},
                .ignore_eos = true});
  EXPECT_EQ(result.sequences[0].ids, want);
}

// What a text costs, token by token, hardly depends on the dtype of the states; two runs give the same bits.
TEST_F(Generate, StatesOf16BitsScoreAlike) {
  Context ctx(ContextOptions{.device = testing::test_device()});
  const LanguageModel model =
      load_language_model(ctx, open_model_directory(golden("shakespeare")), {.dtype = DType::f32});
  const auto text = row_of(golden_array("shakespeare", "greedy_ids.npy"), 0);
  const auto costs = [&](DType dtype) {
    const auto pool = model.make_pool(3, dtype);
    std::vector<State> states;
    std::vector<State*> stepped;
    for (int i = 0; i < 3; ++i) states.emplace_back(pool);
    for (State& state : states) stepped.push_back(&state);
    Stepper stepper(ctx, model);
    std::vector<double> all;
    for (std::size_t t = 0; t + 1 < text.size(); ++t) {
      const std::vector<std::int64_t> ids(3, text[t]);
      const Tensor logits = ctx.to_host(stepper.step(ids, stepped));
      for (std::int64_t i = 0; i < 3; ++i) {
        const Tensor row = logits.select(0, i).contiguous();
        double sum = 0.0;
        for (const float v : row.span<float>()) sum += std::exp(static_cast<double>(v));
        all.push_back(std::log(sum) - row.data<float>()[text[t + 1]]);
      }
    }
    return all;
  };
  const std::vector<double> exact = costs(DType::f32);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const std::vector<double> found = costs(dtype);
    double difference = 0.0;
    for (std::size_t i = 0; i < exact.size(); ++i) difference += std::abs(found[i] - exact[i]);
    difference /= static_cast<double>(exact.size());
    EXPECT_LT(difference, dtype == DType::bf16 ? 0.02 : 0.002) << dtype;
    EXPECT_GT(difference, 0.0) << dtype;
    EXPECT_EQ(costs(dtype), found);
  }
}

// Sequences leave and join between steps, and each goes on as if it were alone.
TEST_F(Generate, BatchesChangeBetweenSteps) {
  Context ctx(ContextOptions{.device = testing::test_device()});
  const LanguageModel model =
      load_language_model(ctx, open_model_directory(golden("shakespeare")), {.dtype = DType::f32});
  const auto text = row_of(golden_array("shakespeare", "greedy_ids.npy"), 0);
  const auto token = [&](std::size_t sequence, std::int64_t position) {
    return text[(7 * sequence + static_cast<std::size_t>(position)) % text.size()];
  };
  const auto pool = model.make_pool(1);  // grows as sequences join
  std::vector<State> states;
  std::vector<State> alone;
  states.reserve(40);
  Stepper stepper(ctx, model);
  const auto check = [&](std::vector<std::size_t> which) {
    std::vector<State*> stepped;
    std::vector<std::int64_t> ids;
    for (const std::size_t s : which) {
      stepped.push_back(&states[s]);
      ids.push_back(token(s, states[s].position()));
    }
    const Tensor logits = ctx.to_host(stepper.step(ids, stepped));
    ASSERT_EQ(logits.size(0), static_cast<std::int64_t>(which.size()));
    for (std::size_t i = 0; i < which.size(); ++i) {
      const Tensor expected =
          ctx.to_host(model.logits(ctx, std::span<const std::int64_t>(&ids[i], 1), alone[which[i]]));
      const Tensor found = logits.select(0, static_cast<std::int64_t>(i)).contiguous();
      for (std::int64_t v = 0; v < found.numel(); ++v)
        ASSERT_NEAR(found.data<float>()[v], expected.data<float>()[v], 2e-3) << "sequence " << which[i];
    }
  };
  const auto join = [&](std::size_t n) {
    while (states.size() < n) {
      states.emplace_back(pool);
      alone.push_back(model.new_state());
    }
    std::vector<std::size_t> all(n);
    for (std::size_t i = 0; i < n; ++i) all[i] = i;
    return all;
  };
  check(join(3));
  for (int i = 0; i < 3; ++i) check(join(5));
  for (int i = 0; i < 3; ++i) check(join(19));
  for (int i = 0; i < 2; ++i) check({18, 4, 2, 9, 11, 0});
  check({7});
  for (int i = 0; i < 2; ++i) check({1, 3, 5, 6, 8, 10, 12, 13, 14, 15, 16, 17, 18, 0, 2, 4, 7});
}

TEST_F(Generate, SizesOfRecordedSteps) {
  std::int64_t last = 0;
  int sizes = 0;
  for (std::int64_t n = 1; n <= 1024; ++n) {
    const std::int64_t size = recorded_size(n);
    EXPECT_GE(size, n);
    EXPECT_EQ(recorded_size(size), size);
    EXPECT_GE(size, last);
    sizes += size != last ? 1 : 0;
    last = size;
  }
  EXPECT_EQ(last, 1024);
  EXPECT_EQ(sizes, 5 + 8 + 14);
  EXPECT_EQ(recorded_size(4), 4);
  EXPECT_EQ(recorded_size(5), 8);
  EXPECT_EQ(recorded_size(17), 32);
  EXPECT_EQ(recorded_size(129), 192);
}

TEST_F(Generate, SeedsDecide) {
  const GenerateOptions options{.max_new_tokens = 40, .seed = 7};
  const std::string first = run({"ROMEO:"}, options).sequences[0].text;
  EXPECT_EQ(run({"ROMEO:"}, options).sequences[0].text, first);
  GenerateOptions other = options;
  other.seed = 8;
  EXPECT_NE(run({"ROMEO:"}, other).sequences[0].text, first);
}

TEST_F(Generate, BatchesEqualSingleSequences) {
  const GenerateOptions options{.max_new_tokens = 24, .sampling = {.temperature = 0.0}, .ignore_eos = true};
  const std::vector<std::string> texts{"ROMEO:", "What is the city but the people?", "A",
                                       "O, she doth teach the"};
  const GenerateResult together = run(texts, options);
  for (std::size_t i = 0; i < texts.size(); ++i)
    EXPECT_EQ(run({texts[i]}, options).sequences[0].ids, together.sequences[i].ids) << texts[i];
  EXPECT_EQ(together.new_tokens, 4 * 24);
}

// Sequences that end leave the batch while the step behind their last token is on its way.
TEST_F(Generate, BatchesThatShrinkEqualSingleSequences) {
  for (const double penalty : {1.0, 1.2}) {
    const GenerateOptions options{.max_new_tokens = 48,
                                  .sampling = {.temperature = 0.0, .repetition_penalty = penalty},
                                  .stop = {"\n", "th"},
                                  .ignore_eos = true};
    const std::vector<std::string> texts{"ROMEO:", "What is the city but the people", "A",
                                         "O, she doth teach the", "First Citizen:"};
    const GenerateResult together = run(texts, options);
    for (std::size_t i = 0; i < texts.size(); ++i) {
      const Generation alone = run({texts[i]}, options).sequences[0];
      EXPECT_EQ(alone.ids, together.sequences[i].ids) << texts[i];
      EXPECT_EQ(alone.finish, together.sequences[i].finish) << texts[i];
      EXPECT_EQ(alone.text, together.sequences[i].text) << texts[i];
    }
  }
}

TEST_F(Generate, StreamedPiecesAreTheText) {
  std::vector<std::string> streamed(2);
  GenerateOptions options{.max_new_tokens = 60, .seed = 3, .stop = {"zzzz", "\n\n\n"}};
  options.on_text = [&](std::int64_t i, std::string_view text) {
    streamed[static_cast<std::size_t>(i)].append(text);
  };
  const GenerateResult result = run({"KING", "First Citizen:"}, options);
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(streamed[i], result.sequences[i].text);
    EXPECT_EQ(result.sequences[i].logprobs.size(),
              result.sequences[i].ids.size() - static_cast<std::size_t>(result.sequences[i].prompt_length));
  }
}

TEST_F(Generate, StopTextsEndAndAreLeftOut) {
  GenerateOptions options{.max_new_tokens = 60, .sampling = {.temperature = 0.0}, .ignore_eos = true};
  const std::string whole = run({"ROMEO:"}, options).sequences[0].text;
  const std::string stop = whole.substr(20, 5);
  options.stop = {stop};
  const Generation g = run({"ROMEO:"}, options).sequences[0];
  EXPECT_EQ(g.finish, FinishReason::stop);
  EXPECT_EQ(g.text, whole.substr(0, whole.find(stop)));
}

TEST_F(Generate, EndsAtEndOfText) {
  // The second token that greedy decoding picks is declared to be the end.
  const GenerateOptions options{.max_new_tokens = 5, .sampling = {.temperature = 0.0}};
  ModelFiles files = open_bundled_model();
  const auto greedy = run({"ROMEO:"}, options).sequences[0];
  const std::int64_t second = greedy.ids[static_cast<std::size_t>(greedy.prompt_length) + 1];
  files.generation_config_json = concat("{\"eos_token_id\": [900000, ", second, "]}");
  const LanguageModel model = load_language_model(ctx_, files);
  const std::vector<std::vector<std::int64_t>> prompts{tokenizer_.encode("ROMEO:")};
  const Generation g = generate(ctx_, model, &tokenizer_, prompts, options).sequences[0];
  EXPECT_EQ(g.finish, FinishReason::eos);
  EXPECT_EQ(g.ids.back(), second);
  EXPECT_LE(g.logprobs.size(), 2U);
}

TEST_F(Generate, InterruptionKeepsWhatWasMade) {
  std::atomic<int> asked{0};
  Context ctx(ContextOptions{.device = testing::test_device(), .cancelled = [&] { return ++asked > 6; }});
  const std::vector<std::vector<std::int64_t>> prompts{tokenizer_.encode("ROMEO:")};
  const GenerateResult r =
      generate(ctx, model_, &tokenizer_, prompts, {.max_new_tokens = 1000, .ignore_eos = true});
  EXPECT_EQ(r.sequences[0].finish, FinishReason::interrupted);
  EXPECT_EQ(r.new_tokens, 6);
  EXPECT_FALSE(r.sequences[0].text.empty());
}

TEST_F(Generate, NothingToDo) {
  const GenerateResult r = run({"ROMEO:"}, {.max_new_tokens = 0});
  EXPECT_EQ(r.new_tokens, 0);
  EXPECT_EQ(r.sequences[0].text, "");
  EXPECT_TRUE(run({}, {}).sequences.empty());
}

TEST_F(Generate, RefusesBadOptions) {
  EXPECT_THROW(run({""}, {}), Error);
  EXPECT_THROW(run({"A"}, {.max_new_tokens = -1}), Error);
  EXPECT_THROW(run({"A"}, {.sampling = {.temperature = -1.0}}), Error);
  EXPECT_THROW(run({"A"}, {.stop = {""}}), Error);
  const std::vector<std::vector<std::int64_t>> prompts{{1}};
  EXPECT_THROW(generate(ctx_, model_, nullptr, prompts, {.stop = {"x"}}), Error);
}

TEST(StopText, FindsStopsAcrossPieces) {
  const std::string text = "abcaabcab";
  for (std::size_t cut = 0; cut <= text.size(); ++cut)
    for (std::size_t second = cut; second <= text.size(); ++second) {
      StopText stop({"aabc", "zz"});
      std::string out = stop.push(text.substr(0, cut));
      out += stop.push(text.substr(cut, second - cut));
      out += stop.push(text.substr(second));
      EXPECT_TRUE(stop.stopped());
      EXPECT_EQ(out, "abc");
    }
}

TEST(StopText, GivesBackWhatWasNoStop) {
  StopText stop({"END"});
  std::string out;
  for (const char* piece : {"xE", "N", "Ex", "EN"}) out += stop.push(piece);
  EXPECT_EQ(out, "xENEx");
  EXPECT_EQ(stop.finish(), "EN");
  EXPECT_FALSE(stop.stopped());
}

}  // namespace
}  // namespace krait
