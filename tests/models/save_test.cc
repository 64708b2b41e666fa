// Saving in each format and loading again; what a format cannot express.
#include "krait/models/save.h"

#include <gtest/gtest.h>

#include <fstream>

#include "io/scratch.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/models/load.h"
#include "models/odd_configs.h"
#include "support/golden.h"

namespace krait {
namespace {

using io::Scratch;
using testing::golden;
using testing::max_difference;
using testing::odd_configs;

Tensor logits_of(const LanguageModel& model) {
  Context ctx;
  Rng rng(3);
  std::vector<std::int64_t> ids(21);
  for (auto& id : ids) id = rng.next_u32() % 50;
  State state = model.new_state();
  return model.logits(ctx, ids, state, LogitRows::all);
}

LanguageModel load(const std::filesystem::path& path) {
  Context ctx;
  return load_language_model(ctx, open_model_directory(path));
}

std::string refusal(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

constexpr std::array kFormats{SaveFormat::krait, SaveFormat::upstream, SaveFormat::hf};

// Which of kFormats can express each of the odd configurations.
const std::map<std::string, std::array<bool, 3>>& expressible() {
  static const std::map<std::string, std::array<bool, 3>> kTable{
      {"mamba1 odd sizes", {true, true, true}}, {"mamba2 groups, hdim D, no norm", {true, true, false}},
      {"mamba2 d_ssm", {true, true, false}},    {"hybrid with mlp", {true, true, false}},
      {"falcon", {true, false, true}},          {"neox sequential", {true, false, true}}};
  return kTable;
}

TEST(Save, EveryFormatLoadsAgainWithTheSameLogits) {
  for (const auto& [name, json] : odd_configs()) {
    LanguageModel model(parse_config(json, name));
    model.initialize(4);
    const Tensor want = logits_of(model);
    for (std::size_t i = 0; i < kFormats.size(); ++i) {
      SCOPED_TRACE(concat(name, ", format ", i));
      const Scratch scratch;
      const auto save = [&] { save_language_model(model, scratch / "out", {.format = kFormats[i]}); };
      if (!expressible().at(name)[i]) {
        EXPECT_NE(refusal(save).find("format cannot express"), std::string::npos);
        EXPECT_FALSE(std::filesystem::exists(scratch / "out"));
        continue;
      }
      save();
      const LanguageModel again = load(scratch / "out");
      EXPECT_EQ(max_difference(logits_of(again), want), 0.0);
      EXPECT_EQ(again.config().eos_token_ids, model.config().eos_token_ids);
    }
  }
}

TEST(Save, FromFormatToFormatLogitsStay) {
  for (const char* name : {"mamba1-tiny", "mamba2-tiny", "hf-mamba-tiny", "hf-mamba2-tiny", "mamba2attn-tiny",
                           "hf-gptneox-tiny"}) {
    SCOPED_TRACE(name);
    LanguageModel model = load(golden(name));
    const Tensor want = logits_of(model);
    for (const SaveFormat first : kFormats)
      for (const SaveFormat second : kFormats) {
        const Scratch scratch;
        const std::string refused = refusal([&] {
          save_language_model(model, scratch / "a", {.format = first});
          LanguageModel between = load(scratch / "a");
          save_language_model(between, scratch / "b", {.format = second});
          EXPECT_EQ(max_difference(logits_of(load(scratch / "b")), want), 0.0);
        });
        EXPECT_TRUE(refused.empty() || refused.find("cannot express") != std::string::npos) << refused;
      }
  }
}

TEST(Save, RoundsMatricesAndKeepsTheRest) {
  LanguageModel model = load(golden("mamba2-tiny"));
  const Scratch scratch;
  save_language_model(model, scratch / "out", {.dtype = DType::bf16, .tokenizer_json = "{}"});
  LanguageModel again = load(scratch / "out");
  std::map<std::string, Tensor> before;
  model.visit([&](const Parameter& p) { before[p.name] = p.tensor; });
  again.visit([&](const Parameter& p) {
    EXPECT_EQ(p.tensor.dtype(), p.kind == ParameterKind::matrix ? DType::bf16 : DType::f32) << p.name;
    EXPECT_EQ(max_difference(p.tensor, before.at(p.name).to(p.tensor.dtype())), 0.0) << p.name;
  });
  EXPECT_TRUE(std::filesystem::exists(scratch / "out/tokenizer.json"));
}

TEST(Save, TheTiedHeadSharesItsStorageInATorchFile) {
  LanguageModel model = load(golden("mamba1-tiny"));
  const Scratch scratch;
  save_language_model(model, scratch / "out", {.format = SaveFormat::upstream});
  const auto tensors = io::read_checkpoint(scratch / "out");
  EXPECT_EQ(tensors.at("lm_head.weight").raw(), tensors.at("backbone.embedding.weight").raw());
}

TEST(Save, WeightsOfAnotherFormatAreNotShadowed) {
  LanguageModel model = load(golden("mamba1-tiny"));
  const Scratch scratch;
  save_language_model(model, scratch / "out", {.format = SaveFormat::upstream});
  EXPECT_NE(refusal([&] { save_language_model(model, scratch / "out"); }).find("pytorch_model.bin"),
            std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(scratch / "out/model.safetensors"));
}

TEST(Save, AFileIsNoDirectory) {
  LanguageModel model = load(golden("mamba1-tiny"));
  const Scratch scratch;
  const auto path = scratch.put("file", "kept");
  EXPECT_EQ(refusal([&] { save_language_model(model, path); }),
            path.string() + ": is a file, expected a directory");
}

TEST(Save, LimitsOfTheStepSurvive) {
  const auto config = parse_config(
      R"({"d_model": 32, "n_layer": 1, "vocab_size": 50, "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "dt_limit": [0.1, Infinity]}})",
      "test");
  for (const SaveFormat format : kFormats) {
    const ModelConfig again = parse_config(config_json(config, format), "saved");
    EXPECT_EQ(again.mamba2.dt_limit.low, 0.1F);
    EXPECT_TRUE(std::isinf(again.mamba2.dt_limit.high));
  }
}

}  // namespace
}  // namespace krait
