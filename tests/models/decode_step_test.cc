// Steps of one sequence in one kernel, against the layers' own operators.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <string>

#include "core/on_device.h"
#include "krait/core/random.h"
#include "krait/models/language_model.h"
#include "krait/models/stepper.h"
#include "krait/ops/decode_step.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::max_difference;

const std::map<std::string, std::string>& configs() {
  static const std::map<std::string, std::string> kConfigs{
      {"mamba1", R"({"d_model": 128, "n_layer": 3, "vocab_size": 203})"},
      {"mamba1 biases, layer norm, 8 states",
       R"({"d_model": 136, "n_layer": 2, "vocab_size": 50, "rms_norm": false,
        "tie_embeddings": false, "ssm_cfg": {"d_state": 8, "expand": 1, "dt_rank": 16, "bias": true}})"},
      {"mamba1 64 states", R"({"d_model": 64, "n_layer": 2, "vocab_size": 50,
        "ssm_cfg": {"d_state": 64, "dt_rank": 24, "conv_bias": false}})"},
      {"mamba1 as mamba-130m", R"({"d_model": 768, "n_layer": 3, "vocab_size": 5003})"},
      {"mamba1 as mamba-370m", R"({"d_model": 1024, "n_layer": 2, "vocab_size": 503})"},
      {"mamba1 as mamba-790m", R"({"d_model": 1536, "n_layer": 1, "vocab_size": 503})"},
      {"mamba1 as mamba-1.4b", R"({"d_model": 2048, "n_layer": 1, "vocab_size": 503})"},
      {"mamba1 as mamba-2.8b", R"({"d_model": 2560, "n_layer": 2, "vocab_size": 1003})"},
      {"mamba1 of 768 with another dt_rank",
       R"({"d_model": 768, "n_layer": 1, "vocab_size": 503, "ssm_cfg": {"dt_rank": 40}})"},
      {"falcon",
       R"({"model_type": "falcon_mamba", "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 50,
        "state_size": 16, "intermediate_size": 192, "use_bias": true})"},
      {"mamba2", R"({"d_model": 128, "n_layer": 3, "vocab_size": 203, "ssm_cfg": {"layer": "Mamba2"}})"},
      {"mamba2 groups, hdim D, no norm", R"({"d_model": 32, "n_layer": 2, "vocab_size": 50, "rms_norm": false,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "ngroups": 2, "d_state": 12, "D_has_hdim": true, "rmsnorm": false,
        "bias": true, "dt_limit": [0.01, 0.2]}})"},
      {"mamba2 four groups, norm before gate", R"({"d_model": 264, "n_layer": 2, "vocab_size": 77,
        "tie_embeddings": false, "ssm_cfg": {"layer": "Mamba2", "headdim": 22, "ngroups": 4, "d_state": 160,
        "norm_before_gate": true}})"},
      {"mamba2 one head of one layer", R"({"d_model": 8, "n_layer": 1, "vocab_size": 5,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 4}})"},
      {"mamba2 as mamba2-130m", R"({"d_model": 768, "n_layer": 3, "vocab_size": 5003,
        "ssm_cfg": {"layer": "Mamba2"}})"},
      {"mamba2 as mamba2-370m", R"({"d_model": 1024, "n_layer": 2, "vocab_size": 503,
        "ssm_cfg": {"layer": "Mamba2"}})"},
      {"mamba2 as mamba2-780m", R"({"d_model": 1536, "n_layer": 1, "vocab_size": 503,
        "ssm_cfg": {"layer": "Mamba2"}})"},
      {"mamba2 as mamba2-1.3b", R"({"d_model": 2048, "n_layer": 1, "vocab_size": 503,
        "ssm_cfg": {"layer": "Mamba2"}})"},
      {"mamba2 as mamba2-2.7b", R"({"d_model": 2560, "n_layer": 2, "vocab_size": 1003,
        "ssm_cfg": {"layer": "Mamba2"}})"},
      {"mamba2 of 768 with another headdim", R"({"d_model": 768, "n_layer": 1, "vocab_size": 503,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 32}})"}};
  return kConfigs;
}

double largest(const Tensor& t) {
  double worst = 0.0;
  for (const float v : t.span<float>()) worst = std::max(worst, std::abs(static_cast<double>(v)));
  return worst;
}

TEST(DecodeStepElsewhere, IsRefusedWithNothingDone) {
  Context ctx;
  const Tensor logits = Tensor::zeros({1, 3});
  logits.fill(7.0);
  EXPECT_FALSE(decode_step(ctx, {.logits = logits}));
  for (const float v : logits.span<float>()) EXPECT_EQ(v, 7.0F);
}

class DecodeStep : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!testing::on_gpu()) GTEST_SKIP() << "a kernel of GPUs";
    ctx_ = std::make_unique<Context>(ContextOptions{.device = testing::test_device()});
  }
  LanguageModel make(const std::string& name, DType dtype) {
    LanguageModel model(parse_config(configs().at(name), name));
    model.initialize(11, dtype);
    // Norms, biases and D that are not what they begin as.
    Rng rng(5);
    model.visit([&](const Parameter& p) {
      if (p.kind == ParameterKind::small && !p.name.ends_with("A_log"))
        for (float& v : p.tensor.span<float>()) v += 0.2F * rng.normal();
    });
    model.to_device(*ctx_);
    return model;
  }
  std::vector<std::int64_t> some_ids(const LanguageModel& model, std::size_t count) {
    Rng rng(3);
    std::vector<std::int64_t> ids(count);
    for (auto& id : ids) id = rng.next_u32() % static_cast<std::uint32_t>(model.config().vocab_size);
    return ids;
  }
  // Logits of steps with a Stepper, one row each, after a prompt.
  std::vector<Tensor> walk(const LanguageModel& model, State& state, std::span<const std::int64_t> prompt,
                           std::span<const std::int64_t> ids) {
    model.logits(*ctx_, prompt, state);
    Stepper stepper(*ctx_, model);
    State* const states[] = {&state};
    std::vector<Tensor> all;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      all.push_back(ctx_->to_host(stepper.step(ids.subspan(i, 1), states)).clone());
      if (i == 0) at_once_ = ctx_->backend() == "decode_step: cuda";
    }
    return all;
  }
  std::unique_ptr<Context> ctx_;
  bool at_once_ = false;
};

TEST_F(DecodeStep, AgreesWithTheLayersOperatorsAndWithItself) {
  for (const auto& [name, json] : configs())
    for (const DType dtype : {DType::f16, DType::bf16})
      for (const DType state_dtype : {DType::f32, DType::bf16}) {
        SCOPED_TRACE(concat(name, ", ", dtype, ", states ", state_dtype));
        const LanguageModel model = make(name, dtype);
        const auto ids = some_ids(model, 24);
        const auto prompt = std::span(ids).first(7);
        const auto steps = std::span(ids).subspan(7);
        const auto pool = model.make_pool(3, state_dtype);
        const State other(pool);  // so that rows are not the first
        State by_layer(pool);
        State at_once(pool);
        const auto got = walk(model, at_once, prompt, steps);
        EXPECT_TRUE(at_once_);
        model.logits(*ctx_, prompt, by_layer);
        // y silu(z) is rounded here, y there.
        const double tolerance = dtype == DType::f16 && state_dtype == DType::f32 ? 0.003 : 0.02;
        double worst = 0.0;
        for (std::size_t i = 0; i < steps.size(); ++i) {
          const Tensor want = ctx_->to_host(model.logits(*ctx_, steps.subspan(i, 1), by_layer));
          worst = std::max(worst, max_difference(got[i], want) / largest(want));
        }
        EXPECT_LT(worst, tolerance);
        for (int layer = 0; layer < pool->n_layer(); ++layer)
          for (const Tensor& states : {pool->conv(layer), pool->ssm(layer)}) {
            const Tensor want = ctx_->to_host(states.select(0, by_layer.row())).to(DType::f32).contiguous();
            EXPECT_LT(max_difference(ctx_->to_host(states.select(0, at_once.row())), want) / largest(want),
                      2 * tolerance)
                << layer;
          }
        // The same bits again, in another row.
        State again(pool);
        const auto repeated = walk(model, again, prompt, steps);
        for (std::size_t i = 0; i < steps.size(); ++i)
          EXPECT_EQ(std::memcmp(got[i].raw(), repeated[i].raw(), got[i].nbytes()), 0) << i;
      }
}

TEST_F(DecodeStep, ManySteps) {
  const LanguageModel model = make("mamba2", DType::f16);
  const auto ids = some_ids(model, 3000);
  State state = model.new_state();
  State twin = model.new_state();
  const auto first = walk(model, state, std::span(ids).first(1), std::span(ids).subspan(1));
  const auto second = walk(model, twin, std::span(ids).first(1), std::span(ids).subspan(1));
  EXPECT_EQ(max_difference(first.back(), second.back()), 0.0);
  State whole = model.new_state();
  const Tensor want = ctx_->to_host(model.logits(*ctx_, ids, whole));
  EXPECT_LT(max_difference(first.back(), want) / largest(want), 0.02);
}

// Models of different sizes take turns in one context, which has one set of words.
TEST_F(DecodeStep, ModelsTakeTurns) {
  const LanguageModel a = make("mamba1", DType::bf16);
  const LanguageModel b = make("mamba2", DType::bf16);
  const LanguageModel c = make("mamba2 as mamba2-130m", DType::bf16);
  State states[] = {a.new_state(), b.new_state(), c.new_state()};
  State twins[] = {a.new_state(), b.new_state(), c.new_state()};
  const LanguageModel* const models[] = {&a, &b, &c};
  Stepper steppers[] = {Stepper(*ctx_, a), Stepper(*ctx_, b), Stepper(*ctx_, c)};
  const std::int64_t id = 3;
  for (int round = 0; round < 5; ++round)
    for (int i = 0; i < 3; ++i) {
      State* const state[] = {&states[i]};
      const Tensor got = ctx_->to_host(steppers[i].step(std::span(&id, 1), state));
      const Tensor want = ctx_->to_host(models[i]->logits(*ctx_, std::span(&id, 1), twins[i]));
      EXPECT_LT(max_difference(got, want) / largest(want), 0.05) << round << ' ' << i;
    }
}

TEST_F(DecodeStep, IsOneKernelOfAProfile) {
  ctx_ = std::make_unique<Context>(ContextOptions{.device = testing::test_device(), .profile = true});
  const LanguageModel model = make("mamba2", DType::f16);
  State state = model.new_state();
  const auto ids = some_ids(model, 5);
  walk(model, state, std::span(ids).first(1), std::span(ids).subspan(1));
  EXPECT_TRUE(at_once_);
  std::int64_t count = 0;
  for (const KernelTime& time : ctx_->profile())
    if (time.name == "decode_step") count = time.count;
  EXPECT_EQ(count, 4);
}

TEST_F(DecodeStep, APaddingSlotLeavesStatesAlone) {
  for (const char* name : {"mamba1", "mamba2"}) {
    SCOPED_TRACE(name);
    const LanguageModel model = make(name, DType::f16);
    State state = model.new_state();
    const auto ids = some_ids(model, 9);
    model.logits(*ctx_, ids, state);
    const auto pool = state.pool();
    const Tensor conv = ctx_->to_host(pool->conv(1)).clone();
    const Tensor ssm = ctx_->to_host(pool->ssm(1)).clone();
    const Tensor logits = ctx_->empty({1, model.config().padded_vocab_size()});
    const Tensor id = ctx_->to_device(Tensor::from(std::vector<std::int64_t>{1}));
    const Tensor row = ctx_->to_device(Tensor::from(std::vector<std::int64_t>{-1}));
    model.step(*ctx_, id, Batch::of_steps(pool, row), logits);
    EXPECT_EQ(ctx_->backend(), "decode_step: cuda");
    EXPECT_TRUE(std::isfinite(largest(ctx_->to_host(logits))));
    EXPECT_EQ(max_difference(ctx_->to_host(pool->conv(1)), conv), 0.0);
    EXPECT_EQ(max_difference(ctx_->to_host(pool->ssm(1)), ssm), 0.0);
  }
}

}  // namespace
}  // namespace krait
