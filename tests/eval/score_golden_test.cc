// The validation loss of a trained model against the one that PyTorch computed.
#include <gtest/gtest.h>

#include <cmath>

#include "krait/eval/score.h"
#include "krait/models/load.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden;
using testing::golden_array;

TEST(ScoreGolden, ValidationLossInF32AndBf16) {
  Context ctx;
  const ModelFiles files = open_model_directory(golden("shakespeare"));
  const double golden_loss = golden_array("shakespeare", "val_loss.npy").to(DType::f64).data<double>()[0];
  const Tensor ids = golden_array("shakespeare", "val_ids.npy");
  const Score exact = score_ids(ctx, load_language_model(ctx, files, {.dtype = DType::f32}), ids);
  EXPECT_NEAR(exact.loss, golden_loss, 1e-3);
  EXPECT_EQ(exact.tokens, 193 * 255);
  EXPECT_NEAR(exact.perplexity, std::exp(exact.loss), 1e-9);
  const Score rounded = score_ids(ctx, load_language_model(ctx, files, {.dtype = DType::bf16}), ids);
  EXPECT_NEAR(rounded.loss, golden_loss, 1e-2);
}

}  // namespace
}  // namespace krait
