#include "krait/ops/attention.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <vector>

#include "krait/core/error.h"
#include "ops/attention/attention_cases.h"
#include "ops/attention/kernels.h"

namespace krait {
namespace {

using namespace testing;

AttentionArgs random_args(Rng& rng, const Shape& s, DType dtype, int layout = 0) {
  return random_inputs(rng, s, dtype, layout, 3.0);
}

Tensor exact(Context& ctx, const AttentionArgs& args) {
  AttentionArgs wide = args;
  wide.q = args.q.to(DType::f64);
  wide.k = args.k.to(DType::f64);
  wide.v = args.v.to(DType::f64);
  wide.out = Tensor();
  wide.path = AttentionPath::reference;
  return testing::run(ctx, attention, wide);
}

void check(Context& ctx, Rng& rng, const Shape& s, DType dtype, int layout) {
  SCOPED_TRACE(concat(name_of(s), " ", dtype, " layout ", layout));
  AttentionArgs args = random_args(rng, s, dtype, layout);
  args.path = fast_path();
  const Tensor expected = exact(ctx, args);
  expect_close(testing::run(ctx, attention, args), expected, 2e-5 + rounding_of(dtype), "out");
}

TEST(Attention, DefinitionByHand) {
  Context ctx;
  for (const AttentionPath path : {AttentionPath::reference, fast_path()}) {
    // One query head over two keys: weights softmax(ln 3 * (1, 0)) = (3/4, 1/4).
    const Tensor q = Tensor::from<float>({std::log(3.0F)}, {1, 1, 1});
    const Tensor k = Tensor::from<float>({1.0F, 0.0F}, {2, 1, 1});
    const Tensor v = Tensor::from<float>({4.0F, 8.0F, 8.0F, 0.0F}, {2, 1, 2});
    const Tensor out = testing::run(ctx, attention, {.q = q, .k = k, .v = v, .path = path});
    expect_close(out, Tensor::from<float>({5.0F, 6.0F}, {1, 1, 2}), 1e-6, "out");
    // Twice the scale squares the ratio: (9/10, 1/10).
    const Tensor sharp = testing::run(ctx, attention, {.q = q, .k = k, .v = v, .scale = 2.0, .path = path});
    expect_close(sharp, Tensor::from<float>({4.4F, 7.2F}, {1, 1, 2}), 1e-6, "sharp");
  }
}

TEST(Attention, SimdMatchesTheReference) {
  on_each_target([] {
    Rng rng(21);
    Context ctx(ContextOptions{.threads = 2});
    for (int trial = 0; trial < 60; ++trial) {
      const Shape s = random_shape(rng, 300);
      check(ctx, rng, s, random_dtype(rng), static_cast<int>(pick(rng, 0, 3)));
      if (::testing::Test::HasFailure()) return;
    }
  });
}

// Sizes at and beside the borders of blocks of rows, of keys, and of the parts that keys are split into.
TEST(Attention, BordersOfBlocks) {
  Rng rng(22);
  Context ctx;
  for (const std::int64_t queries : {8, 9, 84, 167, 168, 169, 337})
    for (const bool causal : {false, true})
      check(ctx, rng, {queries, queries + 1, 1, 1, 16, 24, causal}, DType::f32, 0);
  for (const std::int64_t keys : {127, 128, 129, 1023, 1024, 1025, 4100})
    for (const std::int64_t group : {1, 5, 12})
      for (const bool causal : {false, true})
        check(ctx, rng, {1, keys, 2, group, 64, 64, causal}, DType::f32, 0);
  check(ctx, rng, {2, 2000, 1, 3, 80, 130, true}, DType::bf16, 1);
  check(ctx, rng, {30, 2000, 1, 1, 256, 256, true}, DType::f32, 2);
}

TEST(Attention, CausalQueriesAreTheLastPositions) {
  Rng rng(23);
  Context ctx;
  const AttentionArgs all = random_args(rng, {70, 70, 2, 2, 16, 16, true}, DType::f32);
  const Tensor whole = testing::run(ctx, attention, all);
  for (const std::int64_t begin : {0, 1, 33, 69}) {
    AttentionArgs tail = all;
    tail.q = all.q.slice(0, begin, 70);
    expect_close(testing::run(ctx, attention, tail), whole.slice(0, begin, 70), 2e-6, concat("from ", begin));
  }
  // The first query sees the first key only.
  for (int h = 0; h < 4; ++h)
    expect_close(whole.select(0, 0).select(0, h), all.v.select(0, 0).select(0, h / 2), 1e-6, "first");
}

// Changing a key changes no bit of the queries before it.
TEST(Attention, MasksTheFuture) {
  Rng rng(24);
  Context ctx;
  for (const std::int64_t group : {1, 3}) {
    AttentionArgs args = random_args(rng, {50, 50, 1, group, 8, 8, true}, DType::f32);
    const Tensor before = testing::run(ctx, attention, args).clone();
    args.k.select(0, 30).fill(1000.0);
    args.v.select(0, 30).fill(1000.0);
    const Tensor after = testing::run(ctx, attention, args);
    expect_same_bits(after.slice(0, 0, 30), before.slice(0, 0, 30), "before the change");
    EXPECT_NE(after.data<float>()[30 * group * 8], before.data<float>()[30 * group * 8]);
  }
}

// Scores of thousands: weights relative to the largest never overflow.
TEST(Attention, LargeScores) {
  Rng rng(25);
  Context ctx;
  for (const std::int64_t queries : {1, 20}) {
    AttentionArgs args = random_args(rng, {queries, 700, 1, 1, 16, 16, false}, DType::f32);
    args.scale = 300.0;
    args.path = fast_path();
    const Tensor out = testing::run(ctx, attention, args);
    for (const float value : out.span<float>()) ASSERT_LE(std::abs(value), 1.0F);
    args.scale = -1e-3;
    expect_close(testing::run(ctx, attention, args), exact(ctx, args), 2e-5, "negative scale");
  }
}

TEST(Attention, EmptyShapes) {
  Context ctx;
  for (const AttentionPath path : {AttentionPath::reference, fast_path()}) {
    const auto run = [&](const Dims& q, const Dims& k, const Dims& v, bool causal) {
      const Tensor ones = Tensor::zeros(q);
      ones.fill(1.0);
      return testing::run(
          ctx, attention,
          {.q = ones, .k = Tensor::zeros(k), .v = Tensor::zeros(v), .causal = causal, .path = path});
    };
    for (const std::int64_t queries : {1, 20}) {
      const Tensor out = run({queries, 2, 4}, {0, 1, 4}, {0, 1, 3}, false);
      EXPECT_EQ(out.shape(), (Dims{queries, 2, 3}));
      for (const float value : out.span<float>()) EXPECT_EQ(value, 0.0F);
    }
    EXPECT_EQ(run({0, 2, 4}, {5, 1, 4}, {5, 1, 3}, true).shape(), (Dims{0, 2, 3}));
    EXPECT_EQ(run({0, 2, 4}, {0, 1, 4}, {0, 1, 3}, true).shape(), (Dims{0, 2, 3}));
    EXPECT_EQ(run({3, 0, 4}, {5, 0, 4}, {5, 0, 3}, false).shape(), (Dims{3, 0, 3}));
    EXPECT_EQ(run({3, 1, 4}, {5, 1, 4}, {5, 1, 0}, false).shape(), (Dims{3, 1, 0}));
  }
  // Without channels all scores are 0: the mean of the values.
  const Tensor v = Tensor::from<float>({1.0F, 2.0F, 6.0F}, {3, 1, 1});
  for (const std::int64_t queries : {1, 12}) {
    const Tensor out = testing::run(
        ctx, attention, {.q = Tensor::zeros({queries, 1, 0}), .k = Tensor::zeros({3, 1, 0}), .v = v});
    for (const float value : out.span<float>()) EXPECT_FLOAT_EQ(value, 3.0F);
  }
}

TEST(Attention, DestinationAndDtypes) {
  Rng rng(26);
  Context ctx;
  AttentionArgs args = random_args(rng, {20, 30, 2, 1, 8, 8, true}, DType::f32);
  const Tensor expected = testing::run(ctx, attention, args);
  const Tensor wider = Tensor::zeros({20, 2, 12}, DType::bf16);
  args.out = wider.slice(2, 2, 10);
  EXPECT_EQ(testing::run(ctx, attention, args).raw(), args.out.raw());
  expect_close(args.out, expected, rounding_of(DType::bf16), "out");
  EXPECT_EQ(static_cast<float>(wider.data<bf16>()[1]), 0.0F);
  EXPECT_EQ(static_cast<float>(wider.data<bf16>()[10]), 0.0F);
  // A 16-bit cache under f32 queries.
  args.out = Tensor();
  args.k = args.k.to(DType::f16);
  args.v = args.v.to(DType::f16);
  const Tensor mixed = testing::run(ctx, attention, args);
  EXPECT_EQ(mixed.dtype(), DType::f32);
  expect_close(mixed, exact(ctx, args), 2e-5, "mixed");
}

TEST(Attention, ThreadsDoNotChangeBits) {
  Rng rng(27);
  for (const Shape& s : {Shape{1, 3000, 1, 2, 64, 64, true}, Shape{400, 450, 3, 1, 32, 32, true},
                         Shape{20, 3000, 1, 1, 16, 16, false}}) {
    const AttentionArgs args = random_args(rng, s, DType::f32);
    Tensor first;
    for (const int threads : {1, 2, 3, 8}) {
      Context ctx(ContextOptions{.threads = threads});
      const Tensor out = testing::run(ctx, attention, args);
      if (!first) first = out;
      expect_same_bits(out, first, concat(threads, " threads, Lq ", s.queries));
    }
  }
}

TEST(Attention, Plan) {
  using attention_kernels::make_plan;
  using attention_kernels::Problem;
  const auto splits = [](std::int64_t queries, std::int64_t keys, std::int64_t heads_kv) {
    return make_plan(Problem{.queries = queries, .keys = keys, .heads_kv = heads_kv, .group = 1}).splits;
  };
  EXPECT_EQ(splits(1, 100, 1), 1);
  EXPECT_EQ(splits(1, 4096, 1), 8);
  EXPECT_EQ(splits(1, 1 << 20, 1), 64);
  EXPECT_EQ(splits(1, 1 << 20, 64), 1);
  EXPECT_EQ(splits(4096, 4096, 12), 1);
  EXPECT_EQ(make_plan(Problem{.queries = 169, .keys = 169, .heads_kv = 1, .group = 1}).row_blocks, 2);
}

// What a block of a GPU takes: one row, eight, or a tile of 64; and parts of the keys for a machine of its
// size.
TEST(Attention, PlanOfAGpu) {
  using attention_kernels::Problem;
  const auto plan = [](std::int64_t queries, std::int64_t keys, std::int64_t heads_kv, std::int64_t group,
                       std::int64_t width = 64) {
    return attention_kernels::gpu::make_gpu_plan(Problem{.queries = queries,
                                                         .keys = keys,
                                                         .heads_kv = heads_kv,
                                                         .group = group,
                                                         .head_dim = width,
                                                         .head_dim_v = width});
  };
  EXPECT_EQ(plan(1, 100, 12, 1).rows_of_block, 1);
  EXPECT_EQ(plan(1, 100, 12, 2).rows_of_block, 8);
  EXPECT_EQ(plan(17, 100, 12, 1).rows_of_block, 64);
  EXPECT_EQ(plan(1, 100, 12, 1, 2049).rows_of_block, 64);
  EXPECT_EQ(plan(64, 100, 12, 1, 80).channel_blocks, 2);
  EXPECT_EQ(plan(64, 100, 12, 1, 0).channel_blocks, 1);
  EXPECT_EQ(plan(1, 255, 12, 1).splits, 1);
  EXPECT_EQ(plan(1, 32768, 12, 1).splits, 43);
  EXPECT_EQ(plan(4096, 4096, 12, 1).splits, 1);
  for (const std::int64_t keys : {0, 1, 127, 1000, 4099, 100000}) {
    const auto p = plan(1, keys, 2, 1);
    EXPECT_EQ(p.keys_of_split % 128, 0);
    EXPECT_GE(p.splits * p.keys_of_split, keys);
    EXPECT_LT((p.splits - 1) * p.keys_of_split, std::max<std::int64_t>(keys, 1));
  }
}

TEST(Attention, NamesWhatIsWrong) {
  Context ctx;
  const Tensor q = Tensor::zeros({2, 4, 8});
  const Tensor k = Tensor::zeros({3, 2, 8});
  EXPECT_EQ(message_of([&] {
              attention(ctx, {.q = q, .k = Tensor::zeros({3, 2, 7}), .v = k});
            }),
            "[attention] k has shape (3, 2, 7), expected (Lk, Hkv, 8): the head_dim of q");
  EXPECT_EQ(message_of([&] {
              attention(ctx, {.q = q, .k = k, .v = Tensor::zeros({4, 2, 8})});
            }),
            "[attention] v has shape (4, 2, 8), expected (3, 2, head_dim_v): the positions and heads of k");
  EXPECT_EQ(message_of([&] {
              attention(ctx, {.q = Tensor::zeros({2, 3, 8}), .k = k, .v = k});
            }),
            "[attention] q has 3 heads, expected a multiple of the 2 heads of k");
  EXPECT_EQ(message_of([&] {
              attention(ctx, {.q = Tensor::zeros({4, 4, 8}), .k = k, .v = k, .causal = true});
            }),
            "[attention] 4 queries and 3 keys, expected at least as many keys where causal");
  EXPECT_EQ(message_of([&] { attention(ctx, {.q = q, .k = k, .v = k.to(DType::bf16)}); }),
            "[attention] v has dtype bf16, expected f32: that of k");
  EXPECT_EQ(message_of([&] { attention(ctx, {.q = q, .k = k}); }), "[attention] v is missing");
  EXPECT_EQ(message_of([&] {
              attention(ctx, {.q = q, .k = k, .v = k, .out = Tensor::zeros({2, 4, 7})});
            }),
            "[attention] out has shape (2, 4, 7), expected (2, 4, 8)");
  EXPECT_EQ(message_of([&] {
              attention(ctx, {.q = q.to(DType::f64), .k = k, .v = k, .path = AttentionPath::simd});
            }),
            "[attention] the simd path has no f64, expected f32, bf16 or f16");
}

}  // namespace
}  // namespace krait
