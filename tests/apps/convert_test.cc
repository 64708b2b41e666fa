// krait convert: there and back, and what it refuses.
#include <filesystem>

#include "apps/process.h"
#include "krait/io/npy.h"
#include "support/golden.h"

namespace krait::cli {
namespace {

using Words = std::vector<std::string>;

class Convert : public ::testing::Test {
 protected:
  Convert() {
    io::write_npy(scratch_ / "ids.npy",
                  Tensor::from(std::vector<std::int64_t>{5, 17, 100, 3, 42, 42, 7, 250}, {2, 4}));
  }

  [[nodiscard]] std::string path(std::string_view name) const { return (scratch_ / name).string(); }

  // Logits of a model, or of the bundled one.
  [[nodiscard]] Tensor logits(const std::string& model, const std::string& dtype = "auto") const {
    Words words{"logits", "--ids", path("ids.npy"), "--out", path("logits.npy"), "--dtype", dtype, "-q"};
    if (!model.empty()) words.insert(words.end(), {"--model", model});
    krait_ok(words);
    const Tensor mapped = io::read_npy(scratch_ / "logits.npy");
    return mapped.clone();
  }

  io::Scratch scratch_;
};

TEST_F(Convert, ThereAndBackThroughEveryFormatLogitsStay) {
  const Tensor want = logits("");
  krait_ok({"convert", "--to", "upstream", "--out", path("a"), "-q"});
  krait_ok({"convert", "--model", path("a"), "--to", "hf", "--out", path("b"), "-q"});
  krait_ok({"convert", "--model", path("b"), "--to", "krait", "--out", path("c"), "-q"});
  for (const char* name : {"a", "b", "c"}) {
    SCOPED_TRACE(name);
    EXPECT_EQ(testing::max_difference(logits(path(name)), want), 0.0);
    EXPECT_EQ(read_file(path(name) + "/tokenizer.json"),
              read_file(std::string(KRAIT_MODELS_DIR) + "/shakespeare/tokenizer.json"));
  }
  EXPECT_TRUE(std::filesystem::exists(scratch_ / "a/pytorch_model.bin"));
  EXPECT_TRUE(std::filesystem::exists(scratch_ / "b/tokenizer_config.json"));
  EXPECT_TRUE(std::filesystem::exists(scratch_ / "c/model.safetensors"));
}

TEST_F(Convert, WidensAndNarrows) {
  krait_ok({"convert", "--dtype", "f32", "--out", path("wide"), "-q"});
  EXPECT_EQ(testing::max_difference(logits(path("wide")), logits("", "f32")), 0.0);
  krait_ok({"convert", "--model", path("wide"), "--dtype", "bf16", "--out", path("narrow"), "-q"});
  EXPECT_LT(std::filesystem::file_size(scratch_ / "narrow/model.safetensors") * 3,
            std::filesystem::file_size(scratch_ / "wide/model.safetensors") * 2);
}

TEST_F(Convert, RefusesWhatAFormatCannotExpress) {
  expect_refusal({"convert", "--model", golden("mamba2attn-tiny"), "--to", "hf", "--out", path("x"), "-q"}, 1,
                 {"mamba2attn-tiny", "hf format", "attention layers"});
  expect_refusal(
      {"convert", "--model", golden("hf-gptneox-tiny"), "--to", "upstream", "--out", path("x"), "-q"}, 1,
      {"hf-gptneox-tiny", "upstream format", "GPT-NeoX"});
  EXPECT_FALSE(std::filesystem::exists(scratch_ / "x"));
}

TEST_F(Convert, OverwritesNeitherTheModelNorAnotherFormat) {
  krait_ok({"convert", "--out", path("m"), "-q"});
  const std::string before = read_file(path("m/model.safetensors"));
  expect_refusal({"convert", "--model", path("m"), "--out", path("m"), "-q"}, 1, {"is the model itself"});
  expect_refusal({"convert", "--to", "upstream", "--out", path("m"), "-q"}, 1, {"model.safetensors"});
  EXPECT_EQ(read_file(path("m/model.safetensors")), before);
  expect_refusal({"convert", "--out", path("ids.npy"), "-q"}, 1, {"is a file"});
}

TEST_F(Convert, ErrorsOfUse) {
  expect_refusal({"convert"}, 2, {"--out", "required"});
  expect_refusal({"convert", "--out", path("x"), "--to", "gguf"}, 2, {"--to", "'gguf'", "upstream|hf|krait"});
  expect_refusal({"convert", "--model", path("none"), "--out", path("x")}, 1, {"none"});
}

}  // namespace
}  // namespace krait::cli
