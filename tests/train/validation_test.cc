#include "train/validation.h"

#include <gtest/gtest.h>

#include <cmath>

#include "io/scratch.h"
#include "krait/eval/score.h"
#include "krait/io/npy.h"
#include "krait/models/load.h"
#include "krait/train/dataset.h"
#include "krait/train/token_file.h"

namespace krait {
namespace {

constexpr std::int64_t kLength = 16;

class ValidationTest : public ::testing::Test {
 protected:
  ValidationTest() : tokenizer_(load_tokenizer(open_bundled_model())), model_(config()) {
    model_.initialize(1);
  }
  static ModelConfig config() {
    return parse_config(R"({"d_model": 16, "n_layer": 1, "vocab_size": 1024,
                            "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8}})",
                        "config");
  }
  [[nodiscard]] ValidationSet open(const std::vector<std::string>& paths) {
    return {ctx_, paths, &tokenizer_, kLength, 1024};
  }
  // Mean loss of rows of ids, and how many predictions it is over.
  [[nodiscard]] Score score(std::vector<std::int64_t> ids, std::int64_t length) {
    const auto rows = static_cast<std::int64_t>(ids.size()) / length;
    ids.resize(static_cast<std::size_t>(rows * length));
    return score_ids(ctx_, model_, Tensor::from(ids, {rows, length}));
  }

  io::Scratch scratch_;
  Context ctx_;
  Tokenizer tokenizer_;
  LanguageModel model_;
  const std::string first_ =
      "Before we proceed any further, hear me speak. Speak, speak. You are all resolved rather to die.";
  const std::string second_ = "First, you know Caius Marcius is chief enemy to the people. We know it well.";
};

TEST_F(ValidationTest, TextsAreCutAsScoreCutsThem) {
  const std::string a = scratch_.put("a.txt", first_).string();
  const std::string b = scratch_.put("b.txt", second_).string();
  const Score one = score_text(ctx_, model_, tokenizer_, first_, kLength);
  const Score other = score_text(ctx_, model_, tokenizer_, second_, kLength);
  const auto result = open({a}).evaluate(ctx_, model_);
  EXPECT_DOUBLE_EQ(result.loss, one.loss);
  EXPECT_DOUBLE_EQ(result.bits_per_byte.value_or(0), *one.bits_per_byte);
  // Two files are one mean over all predictions.
  const auto both = open({a, b}).evaluate(ctx_, model_);
  const double predictions = static_cast<double>(one.tokens + other.tokens);
  EXPECT_DOUBLE_EQ(both.loss, (one.loss * static_cast<double>(one.tokens) +
                               other.loss * static_cast<double>(other.tokens)) /
                                  predictions);
  const auto tokens =
      static_cast<double>(tokenizer_.encode(first_).size() + tokenizer_.encode(second_).size());
  EXPECT_NEAR(both.bits_per_byte.value_or(0),
              both.loss / std::log(2.0) * tokens / static_cast<double>(first_.size() + second_.size()),
              1e-12);
}

TEST_F(ValidationTest, DocumentsOfJsonLinesFollowEachOther) {
  const std::string path =
      scratch_.put("a.jsonl", "{\"text\": \"" + first_ + "\"}\n{\"text\": \"" + second_ + "\"}\n").string();
  std::vector<std::int64_t> ids;
  for (const std::string& text : {first_, second_}) {
    const auto more = tokenizer_.encode(text);
    ids.insert(ids.end(), more.begin(), more.end());
    if (const auto end = end_of_text(tokenizer_)) ids.push_back(*end);
  }
  const auto result = open({path}).evaluate(ctx_, model_);
  EXPECT_DOUBLE_EQ(result.loss, score(ids, kLength).loss);
  EXPECT_NEAR(result.bits_per_byte.value_or(0),
              result.loss / std::log(2.0) * static_cast<double>(ids.size()) /
                  static_cast<double>(first_.size() + second_.size()),
              1e-12);
}

TEST_F(ValidationTest, IdsHaveNoBytes) {
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < 70; ++i) ids.push_back(i * i % 1000);
  const auto stream = scratch_ / "stream.npy";
  io::write_npy(stream, Tensor::from(ids));
  const auto result = open({stream.string()}).evaluate(ctx_, model_);
  EXPECT_DOUBLE_EQ(result.loss, score(ids, kLength).loss);
  EXPECT_FALSE(result.bits_per_byte.has_value());
  // Fixed batches keep their length.
  const auto batches = scratch_ / "batches.npy";
  io::write_npy(batches, Tensor::from(ids, {5, 2, 7}));
  EXPECT_DOUBLE_EQ(open({batches.string()}).evaluate(ctx_, model_).loss, score(ids, 7).loss);
  // Beside a text, there are bytes of a part only.
  EXPECT_FALSE(open({scratch_.put("a.txt", first_).string(), stream.string()})
                   .evaluate(ctx_, model_)
                   .bits_per_byte.has_value());
}

TEST_F(ValidationTest, PackedTokensAreThoseOfTheText) {
  const auto text = scratch_.put("a.txt", first_ + second_);
  pack_token_file(ctx_, {text}, tokenizer_, scratch_ / "a.bin");
  EXPECT_DOUBLE_EQ(open({(scratch_ / "a.bin").string()}).evaluate(ctx_, model_).loss,
                   open({text.string()}).evaluate(ctx_, model_).loss);
}

TEST_F(ValidationTest, Refusals) {
  const auto refused = [&](const std::string& path, const std::string& part) {
    EXPECT_MESSAGE(open({path}), part);
  };
  refused((scratch_ / "nowhere.txt").string(), "nowhere.txt");
  refused(scratch_.put("short.txt", "short").string(), "expected at least seq_len = 16");
  io::write_npy(scratch_ / "f.npy", Tensor::zeros({100}));
  refused((scratch_ / "f.npy").string(), "f.npy: array has dtype f32");
  io::write_npy(scratch_ / "ids.npy", Tensor::from(std::vector<std::int64_t>(100, 1024)));
  refused((scratch_ / "ids.npy").string(), "1024");
  io::write_npy(scratch_ / "d.npy", Tensor::zeros({10, 10}, DType::i64));
  refused((scratch_ / "d.npy").string(), "d.npy: array has shape (10, 10)");
  const std::string text = scratch_.put("a.txt", first_).string();
  EXPECT_MESSAGE(ValidationSet(ctx_, {text}, nullptr, kLength, 1024), "has no tokenizer");
}

}  // namespace
}  // namespace krait
