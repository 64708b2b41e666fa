#include "ops/decode_step/plan.h"

#include <gtest/gtest.h>

namespace krait::decode_detail {
namespace {

constexpr int kMostLayers = 128;
constexpr int kMultiprocessors = 132;
constexpr std::int64_t kShared = 232448;

DecodeSizes mamba2(std::int64_t d_model, std::int64_t layers) {
  return {.mamba2 = true,
          .layers = layers,
          .d_model = d_model,
          .d_inner = 2 * d_model,
          .d_state = 128,
          .heads = d_model / 32,
          .vocabulary = 50288};
}
DecodeSizes mamba1(std::int64_t d_model, std::int64_t layers) {
  return {.layers = layers,
          .d_model = d_model,
          .d_inner = 2 * d_model,
          .d_state = 16,
          .dt_rank = d_model / 16,
          .vocabulary = 50280};
}
DecodePlan plan_of(const DecodeSizes& sizes) {
  return choose_decode_plan(sizes, kMostLayers, kMultiprocessors, kShared);
}

TEST(DecodePlan, ABlockForEachMultiprocessorAndARingOfWhatIsLeft) {
  for (const DecodeSizes& s : {mamba1(768, 24), mamba1(2560, 64), mamba2(768, 24), mamba2(2560, 64)}) {
    const DecodePlan plan = plan_of(s);
    EXPECT_EQ(plan.blocks, kMultiprocessors);
    EXPECT_GE(plan.ring, 180 * 1024);
    EXPECT_LE(plan.shared + kDeclaredShared, kShared);
    EXPECT_LE(plan.model_tile * s.d_model * 2, kTileBytes);
    EXPECT_LE(plan.inner_tile * s.d_inner * 2, kTileBytes);
    EXPECT_LE(plan.state_tile * s.d_state * 4, kTileBytes);
    for (const int tile : {plan.model_tile, plan.inner_tile}) EXPECT_EQ(kMostRows % tile, 0);
    EXPECT_EQ(plan.state_tile % 2, 0);
    EXPECT_LT(plan.in_flight << plan.piece_shift, plan.ring);
  }
  EXPECT_EQ(plan_of(mamba2(768, 24)).model_tile, 32);
  EXPECT_EQ(plan_of(mamba2(2560, 64)).inner_tile, 4);
}

TEST(DecodePlan, EveryBlockHasRowsOfEveryStage) {
  DecodeSizes s = mamba2(32, 2);
  EXPECT_EQ(plan_of(s).blocks, 16);
  s.d_inner = 24;
  s.heads = 3;
  EXPECT_EQ(plan_of(s).blocks, 12);
  for (int block = 0; block < 12; ++block)
    for (const std::int64_t rows : {s.d_model, s.d_inner, in_rows(s)})
      EXPECT_GT(share_of(static_cast<int>(rows), block, 12).count, 0);
}

TEST(DecodePlan, RefusesWhatTheKernelIsNotMadeFor) {
  EXPECT_GT(plan_of(mamba2(768, 24)).blocks, 0);
  const auto refuses = [](DecodeSizes s, const auto& change) {
    change(s);
    return plan_of(s).blocks == 0;
  };
  EXPECT_TRUE(refuses(mamba2(768, 24), [](auto& s) { s.layers = 129; }));
  EXPECT_TRUE(refuses(mamba2(768, 24), [](auto& s) { s.layers = 0; }));
  EXPECT_TRUE(refuses(mamba2(768, 24), [](auto& s) { s.d_model = 772; }));
  EXPECT_TRUE(refuses(mamba2(768, 24), [](auto& s) { s.d_inner = 8256; }));
  EXPECT_TRUE(refuses(mamba2(768, 24), [](auto& s) { s.d_state = 130; }));
  EXPECT_TRUE(refuses(mamba2(768, 24), [](auto& s) { s.d_state = 260; }));
  EXPECT_TRUE(refuses(mamba2(768, 24), [](auto& s) { s.groups = 5; }));
  EXPECT_TRUE(refuses(mamba2(768, 24), [](auto& s) { s.heads = 512; }));  // of 3 channels
  EXPECT_TRUE(refuses(mamba1(768, 24), [](auto& s) { s.dt_rank = 44; }));
  EXPECT_TRUE(refuses(mamba1(768, 24), [](auto& s) { s.dt_rank = 264; }));
  EXPECT_TRUE(refuses(mamba1(768, 24), [](auto& s) { s.d_state = 12; }));
  EXPECT_TRUE(refuses(mamba1(768, 24), [](auto& s) { s.d_state = 128; }));
  EXPECT_EQ(choose_decode_plan(mamba2(768, 24), kMostLayers, kMultiprocessors, 99 * 1024).blocks, 0);
}

TEST(DecodePlan, SharesCoverAllRowsInPairs) {
  for (const int count : {1, 2, 5, 16, 80, 3352, 50277})
    for (const int blocks : {1, 7, 132}) {
      int next = 0;
      for (int block = 0; block < blocks; ++block) {
        const Share share = share_of(count, block, blocks);
        EXPECT_EQ(share.first % 2, 0);
        if (share.count <= 0) continue;
        EXPECT_EQ(share.first, next);
        EXPECT_LE(share.count, ((count + 1) / 2 + blocks - 1) / blocks * 2);
        next += share.count;
      }
      EXPECT_EQ(next, count);
    }
}

TEST(DecodePlan, WordsOfAllVectors) {
  EXPECT_EQ(in_rows(mamba2(768, 24)), 3352);
  EXPECT_EQ(conv_channels(mamba2(768, 24)), 1792);
  EXPECT_EQ(word_count(mamba2(768, 24)), (3352 + 1536 + 768) / 2);
  EXPECT_EQ(word_count(mamba1(768, 24)), (3072 + 80 + 1536 + 768) / 2);
}

}  // namespace
}  // namespace krait::decode_detail
