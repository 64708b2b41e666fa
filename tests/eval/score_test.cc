#include "krait/eval/score.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "krait/core/error.h"
#include "krait/models/load.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden;
using testing::golden_array;
using testing::row_of;

class ScoreTest : public ::testing::Test {
 protected:
  ScoreTest() : files_(open_model_directory(golden("shakespeare"))) {}
  Context ctx_;
  ModelFiles files_;
};

TEST_F(ScoreTest, LossIsTheMeanOverLogits) {
  const LanguageModel model = load_language_model(ctx_, files_);
  const Tensor ids = golden_array("shakespeare", "val_ids.npy").slice(0, 0, 2).slice(1, 0, 20);
  double sum = 0;
  for (std::int64_t r = 0; r < 2; ++r) {
    const auto row = row_of(ids, r);
    State state = model.new_state();
    const Tensor logits = model.logits(ctx_, row, state, LogitRows::all);
    for (std::size_t t = 0; t + 1 < row.size(); ++t) {
      const Tensor at = logits.select(0, static_cast<std::int64_t>(t));
      double total = 0;
      for (const float v : at.span<float>()) total += std::exp(static_cast<double>(v));
      sum += std::log(total) - at.data<float>()[row[t + 1]];
    }
  }
  EXPECT_NEAR(score_ids(ctx_, model, ids).loss, sum / 38, 1e-5);
}

TEST_F(ScoreTest, TextAsAStreamAndInBlocks) {
  const LanguageModel model = load_language_model(ctx_, files_);
  const Tokenizer tokenizer = load_tokenizer(files_);
  const std::string text =
      "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n";
  const auto count = static_cast<std::int64_t>(tokenizer.encode(text).size());
  const Score stream = score_text(ctx_, model, tokenizer, text);
  EXPECT_EQ(stream.tokens, count - 1);
  EXPECT_NEAR(*stream.bits_per_byte,
              stream.loss / std::numbers::ln2 * static_cast<double>(count) / static_cast<double>(text.size()),
              1e-12);
  const Score blocks = score_text(ctx_, model, tokenizer, text, 10);
  EXPECT_EQ(blocks.tokens, count / 10 * 9);
  EXPECT_GT(blocks.loss, stream.loss);
  EXPECT_THROW(score_text(ctx_, model, tokenizer, text, 1), Error);
  EXPECT_THROW(score_text(ctx_, model, tokenizer, text, 10000), Error);
  EXPECT_THROW(score_text(ctx_, model, tokenizer, ""), Error);
}

TEST_F(ScoreTest, LogitsOfIdsHasARowForEachToken) {
  const LanguageModel model = load_language_model(ctx_, files_);
  const Tensor ids = golden_array("shakespeare", "val_ids.npy").slice(0, 0, 3).slice(1, 0, 7);
  const Tensor logits = logits_of_ids(ctx_, model, ids);
  EXPECT_EQ(logits.shape(), (Dims{3, 7, 1024}));
  State state = model.new_state();
  const Tensor row = model.logits(ctx_, row_of(ids, 2), state, LogitRows::all);
  EXPECT_LT(testing::max_difference(logits.select(0, 2), row), 1e-4);
}

TEST_F(ScoreTest, RefusesOtherShapes) {
  const LanguageModel model = load_language_model(ctx_, files_);
  EXPECT_THROW(score_ids(ctx_, model, Tensor::zeros({5}, DType::i64)), Error);
  EXPECT_THROW(score_ids(ctx_, model, Tensor::zeros({5, 1}, DType::i64)), Error);
  EXPECT_THROW(score_ids(ctx_, model, Tensor::zeros({2, 5})), Error);
}

}  // namespace
}  // namespace krait
