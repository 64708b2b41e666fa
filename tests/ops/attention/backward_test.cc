#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "krait/core/error.h"
#include "krait/ops/attention.h"
#include "ops/attention/attention_cases.h"
#include "ops/attention/kernels.h"
#include "ops/finite_difference.h"

namespace krait {
namespace {

using namespace testing;
using test::expect_gradient;
using test::weighted_sum;

// A destination of anything but zeros, which has to be written all over.
Tensor destination(const Dims& shape, DType dtype, int layout = 0) {
  const Tensor t = Tensor::empty(shape, dtype);
  t.fill(std::numeric_limits<double>::quiet_NaN());
  return laid_out(t, layout);
}

// Random inputs, the out and logsumexp of the forward, and destinations for all gradients.
AttentionBackwardArgs random_args(Rng& rng, const Shape& s, DType dtype, int layout = 0, double scale = 0.0) {
  const std::int64_t heads = s.heads_kv * s.group;
  const AttentionArgs inputs = random_inputs(rng, s, dtype, layout, 2.0);
  AttentionBackwardArgs args{
      .q = inputs.q,
      .k = inputs.k,
      .v = inputs.v,
      .causal = s.causal,
      .scale = scale,
      .out = destination({s.queries, heads, s.head_dim_v}, dtype, layout),
      .logsumexp = destination({s.queries, heads}, dtype == DType::f64 ? DType::f64 : DType::f32, layout),
      .dout = random_tensor(rng, {s.queries, heads, s.head_dim_v}, dtype, -1.0, 1.0, layout),
      .dq = destination({s.queries, heads, s.head_dim}, dtype, layout),
      .dk = destination({s.keys, s.heads_kv, s.head_dim}, dtype, layout),
      .dv = destination({s.keys, s.heads_kv, s.head_dim_v}, dtype, layout)};
  Context ctx;
  testing::run(ctx, attention,
               {.q = args.q,
                .k = args.k,
                .v = args.v,
                .causal = args.causal,
                .scale = args.scale,
                .out = args.out,
                .logsumexp = args.logsumexp});
  return args;
}

// The same problem for the reference in f64.
AttentionBackwardArgs widened(const AttentionBackwardArgs& args) {
  return {.q = to_f64(args.q),
          .k = to_f64(args.k),
          .v = to_f64(args.v),
          .causal = args.causal,
          .scale = args.scale,
          .out = to_f64(args.out),
          .logsumexp = to_f64(args.logsumexp),
          .dout = to_f64(args.dout),
          .dq = destination(args.q.shape(), DType::f64),
          .dk = destination(args.k.shape(), DType::f64),
          .dv = destination(args.v.shape(), DType::f64)};
}

// Sums of many terms cancel: the error is that of the largest element.
void expect_close_to_largest(const Tensor& found, const Tensor& expected, double tolerance,
                             const std::string& what) {
  double largest = 1.0;
  for (const double x : expected.span<double>()) largest = std::fmax(largest, std::abs(x));
  expect_close(found, expected, tolerance * largest, what);
}

void check(Context& ctx, Rng& rng, const Shape& s, DType dtype, int layout, double scale = 0.0) {
  SCOPED_TRACE(concat(name_of(s), " ", dtype, " layout ", layout, " scale ", scale));
  AttentionBackwardArgs args = random_args(rng, s, dtype, layout, scale);
  args.path = fast_path();
  testing::run(ctx, attention_backward, args);
  const AttentionBackwardArgs exact = widened(args);
  testing::run(ctx, attention_backward, exact);
  const double tolerance = 1e-5 + rounding_of(dtype);
  expect_close_to_largest(args.dq, exact.dq, tolerance, "dq");
  expect_close_to_largest(args.dk, exact.dk, tolerance, "dk");
  expect_close_to_largest(args.dv, exact.dv, tolerance, "dv");
}

TEST(AttentionLogsumexp, ByHand) {
  Context ctx;
  for (const AttentionPath path : {AttentionPath::reference, fast_path()}) {
    const Tensor q = Tensor::from<float>({std::log(3.0F)}, {1, 1, 1});
    const Tensor k = Tensor::from<float>({1.0F, 0.0F}, {2, 1, 1});
    for (const std::int64_t head_dim_v : {2, 0}) {
      const Tensor sums = destination({1, 1}, DType::f32);
      testing::run(ctx, attention,
                   {.q = q, .k = k, .v = Tensor::zeros({2, 1, head_dim_v}), .logsumexp = sums, .path = path});
      EXPECT_NEAR(sums.data<float>()[0], std::log(4.0), 1e-6) << "head_dim_v " << head_dim_v;
    }
    const Tensor none = destination({1, 1}, DType::f32);
    const Tensor no_keys = Tensor::zeros({0, 1, 1});
    testing::run(ctx, attention, {.q = q, .k = no_keys, .v = no_keys, .logsumexp = none, .path = path});
    EXPECT_EQ(none.data<float>()[0], -std::numeric_limits<float>::infinity());
  }
}

// Few rows, many rows, keys in parts, and memory of all kinds.
TEST(AttentionLogsumexp, SimdMatchesTheReference) {
  on_each_target([] {
    Rng rng(41);
    Context ctx(ContextOptions{.threads = 2});
    for (const Shape& s :
         {Shape{1, 1, 1, 1, 3, 2, true}, Shape{3, 40, 2, 2, 16, 8, true}, Shape{1, 2500, 1, 3, 8, 8, false},
          Shape{90, 170, 2, 3, 24, 5, true}, Shape{40, 1300, 1, 1, 7, 9, false}})
      for (const int layout : {0, 1, 2, 3}) {
        SCOPED_TRACE(concat(name_of(s), " layout ", layout));
        const AttentionBackwardArgs args = random_args(rng, s, DType::f32, layout);
        const Tensor expected = destination(args.logsumexp.shape(), DType::f64);
        testing::run(ctx, attention,
                     {.q = args.q.to(DType::f64),
                      .k = args.k.to(DType::f64),
                      .v = args.v.to(DType::f64),
                      .causal = s.causal,
                      .logsumexp = expected});
        expect_close(args.logsumexp, expected, 2e-6, "logsumexp");
      }
  });
}

TEST(AttentionBackward, ReferenceAgainstDifferences) {
  Rng rng(42);
  Context ctx;
  for (const Shape& s :
       {Shape{3, 3, 1, 1, 2, 2, false}, Shape{4, 4, 1, 1, 3, 2, true}, Shape{3, 5, 2, 3, 2, 4, true},
        Shape{4, 2, 2, 2, 3, 3, false}, Shape{1, 6, 1, 2, 5, 1, true}})
    for (const double scale : {0.0, -0.7}) {
      SCOPED_TRACE(concat(name_of(s), " scale ", scale));
      const AttentionBackwardArgs args = random_args(rng, s, DType::f64, 0, scale);
      testing::run(ctx, attention_backward, args);
      const auto loss = [&] {
        return weighted_sum(
            testing::run(ctx, attention,
                         {.q = args.q, .k = args.k, .v = args.v, .causal = args.causal, .scale = args.scale}),
            args.dout);
      };
      expect_gradient(loss, args.q, args.dq, "dq");
      expect_gradient(loss, args.k, args.dk, "dk");
      expect_gradient(loss, args.v, args.dv, "dv");
    }
}

TEST(AttentionBackward, SimdMatchesTheReference) {
  on_each_target([] {
    Rng rng(43);
    Context ctx(ContextOptions{.threads = 2});
    for (int trial = 0; trial < 50; ++trial) {
      const Shape s = random_shape(rng, 200);
      check(ctx, rng, s, random_dtype(rng), static_cast<int>(pick(rng, 0, 3)), coin(rng) ? 0.0 : -0.3);
      if (::testing::Test::HasFailure()) return;
    }
  });
}

// Sizes at and beside the borders of blocks of rows and of keys, and enough rows for more than one task a
// head.
TEST(AttentionBackward, BordersOfBlocks) {
  Rng rng(44);
  Context ctx;
  for (const std::int64_t queries : {1, 167, 168, 169, 337})
    for (const bool causal : {false, true})
      check(ctx, rng, {queries, queries + 1, 1, 1, 16, 24, causal}, DType::f32, 0);
  for (const std::int64_t keys : {127, 128, 129, 257})
    for (const bool causal : {false, true}) check(ctx, rng, {43, keys, 2, 4, 8, 8, causal}, DType::f32, 0);
  check(ctx, rng, {450, 500, 1, 3, 8, 4, true}, DType::f32, 1);
  check(ctx, rng, {450, 300, 1, 3, 4, 8, false}, DType::bf16, 2);
  check(ctx, rng, {20, 30, 1, 1, 300, 260, true}, DType::f32, 0);
}

TEST(AttentionBackward, Plan) {
  using attention_kernels::make_backward_plan;
  using attention_kernels::Problem;
  const auto splits = [](std::int64_t queries, std::int64_t group, std::int64_t heads_kv) {
    return make_backward_plan(
               Problem{.queries = queries, .keys = queries, .heads_kv = heads_kv, .group = group})
        .splits;
  };
  EXPECT_EQ(splits(0, 1, 1), 1);
  EXPECT_EQ(splits(512, 1, 12), 1);
  EXPECT_EQ(splits(450, 3, 1), 2);
  EXPECT_EQ(splits(4096, 1, 12), 3);
  EXPECT_EQ(splits(1 << 20, 8, 1), 32);
  EXPECT_EQ(splits(1 << 20, 1, 64), 1);
}

// What an early query asks for never reaches a later key, not by a bit.
TEST(AttentionBackward, MasksTheFuture) {
  Rng rng(45);
  Context ctx;
  for (const std::int64_t group : {1, 3}) {
    const AttentionBackwardArgs args = random_args(rng, {50, 60, 1, group, 8, 8, true}, DType::f32);
    testing::run(ctx, attention_backward, args);
    const Tensor dk = args.dk.clone();
    const Tensor dv = args.dv.clone();
    args.dout.slice(0, 0, 20).fill(1000.0);  // queries 0 .. 19 see keys up to 29
    testing::run(ctx, attention_backward, args);
    expect_same_bits(args.dk.slice(0, 30, 60), dk.slice(0, 30, 60), "dk after the change");
    expect_same_bits(args.dv.slice(0, 30, 60), dv.slice(0, 30, 60), "dv after the change");
    EXPECT_NE(args.dk.data<float>()[29 * 8], dk.data<float>()[29 * 8]);
    EXPECT_NE(args.dv.data<float>()[29 * 8], dv.data<float>()[29 * 8]);
  }
}

TEST(AttentionBackward, ComputesWhatIsAskedFor) {
  Rng rng(46);
  Context ctx;
  for (const AttentionPath path : {AttentionPath::reference, fast_path()}) {
    AttentionBackwardArgs all = random_args(rng, {30, 140, 2, 2, 8, 12, true}, DType::f32);
    all.path = path;
    testing::run(ctx, attention_backward, all);
    for (int wanted = 0; wanted < 8; ++wanted) {
      SCOPED_TRACE(concat("path ", static_cast<int>(path), " wanted ", wanted));
      AttentionBackwardArgs some = all;
      some.dq = (wanted & 1) != 0 ? destination(all.dq.shape(), DType::f32) : Tensor();
      some.dk = (wanted & 2) != 0 ? destination(all.dk.shape(), DType::f32) : Tensor();
      some.dv = (wanted & 4) != 0 ? destination(all.dv.shape(), DType::f32) : Tensor();
      testing::run(ctx, attention_backward, some);
      if (some.dq) expect_same_bits(some.dq, all.dq, "dq");
      if (some.dk) expect_same_bits(some.dk, all.dk, "dk");
      if (some.dv) expect_same_bits(some.dv, all.dv, "dv");
    }
  }
}

// Gradients of f32 from inputs of 16 bits, into parts of wider tensors whose rest stays.
TEST(AttentionBackward, DestinationsAndDtypes) {
  Rng rng(47);
  Context ctx;
  AttentionBackwardArgs args = random_args(rng, {20, 30, 2, 2, 8, 8, true}, DType::bf16);
  const Tensor joined = Tensor::zeros({30, 8, 10}, DType::f32);
  joined.fill(7.0);
  args.dq = joined.slice(0, 10, 30).slice(1, 0, 4).slice(2, 1, 9);
  args.dk = joined.slice(1, 4, 6).slice(2, 1, 9);
  args.dv = joined.slice(1, 6, 8).slice(2, 1, 9);
  testing::run(ctx, attention_backward, args);
  const AttentionBackwardArgs exact = widened(args);
  testing::run(ctx, attention_backward, exact);
  expect_close(args.dq, exact.dq, 1e-5, "dq");
  expect_close(args.dk, exact.dk, 1e-5, "dk");
  expect_close(args.dv, exact.dv, 1e-5, "dv");
  const auto expect_sevens = [](const Tensor& t) {
    const Tensor rest = t.contiguous();
    for (const float x : rest.span<float>()) ASSERT_EQ(x, 7.0F);
  };
  expect_sevens(joined.select(2, 0));
  expect_sevens(joined.select(2, 9));
  expect_sevens(joined.slice(0, 0, 10).slice(1, 0, 4));
}

// A weight of 1 beside weights that vanish: no overflow, and no gradient for the scores.
TEST(AttentionBackward, LargeScores) {
  Rng rng(48);
  Context ctx;
  for (const AttentionPath path : {AttentionPath::reference, fast_path()}) {
    AttentionBackwardArgs args = random_args(rng, {20, 300, 1, 1, 16, 16, false}, DType::f32, 0, 300.0);
    args.path = path;
    testing::run(ctx, attention_backward, args);
    for (const Tensor& t : {args.dq, args.dk, args.dv})
      for (const float x : t.span<float>()) ASSERT_TRUE(std::isfinite(x));
    double sum = 0.0;  // each query gives its dout to the values, whole
    for (const float x : args.dv.span<float>()) sum += static_cast<double>(x);
    double expected = 0.0;
    for (const float x : args.dout.span<float>()) expected += static_cast<double>(x);
    EXPECT_NEAR(sum, expected, 0.1);
  }
}

TEST(AttentionBackward, EmptyShapes) {
  Rng rng(49);
  Context ctx;
  const auto expect_zeros = [](const Tensor& t, const char* name) {
    for (const float x : t.span<float>()) ASSERT_EQ(x, 0.0F) << name;
  };
  for (const AttentionPath path : {AttentionPath::reference, fast_path()})
    for (const Shape& s :
         {Shape{0, 5, 2, 2, 4, 3, true}, Shape{0, 0, 1, 1, 4, 3, true}, Shape{6, 0, 1, 2, 4, 3, false},
          Shape{3, 5, 0, 1, 4, 3, false}, Shape{3, 5, 2, 0, 4, 3, false}, Shape{3, 5, 1, 1, 4, 0, false}}) {
      SCOPED_TRACE(concat(name_of(s), " path ", static_cast<int>(path)));
      AttentionBackwardArgs args = random_args(rng, s, DType::f32);
      args.path = path;
      testing::run(ctx, attention_backward, args);
      expect_zeros(args.dq, "dq");
      expect_zeros(args.dk, "dk");
      expect_zeros(args.dv, "dv");
    }
  // Without channels all weights are equal.
  for (const AttentionPath path : {AttentionPath::reference, fast_path()}) {
    AttentionBackwardArgs args = random_args(rng, {2, 4, 1, 1, 0, 1, false}, DType::f32);
    args.path = path;
    testing::run(ctx, attention_backward, args);
    const float mean = (args.dout.data<float>()[0] + args.dout.data<float>()[1]) / 4.0F;
    for (const float x : args.dv.span<float>()) EXPECT_NEAR(x, mean, 1e-6);
  }
}

TEST(AttentionBackward, ThreadsDoNotChangeBits) {
  Rng rng(50);
  for (const Shape& s : {Shape{450, 500, 1, 3, 8, 4, true}, Shape{60, 70, 3, 2, 16, 16, true}}) {
    const AttentionBackwardArgs args = random_args(rng, s, DType::f32);
    Tensor dq;
    Tensor dk;
    Tensor dv;
    for (const int threads : {1, 3, 8}) {
      SCOPED_TRACE(concat(name_of(s), " threads ", threads));
      Context ctx(ContextOptions{.threads = threads});
      testing::run(ctx, attention_backward, args);
      if (threads == 1) {
        dq = args.dq.clone();
        dk = args.dk.clone();
        dv = args.dv.clone();
      }
      expect_same_bits(args.dq, dq, "dq");
      expect_same_bits(args.dk, dk, "dk");
      expect_same_bits(args.dv, dv, "dv");
    }
  }
}

TEST(AttentionBackward, NamesWhatIsWrong) {
  Rng rng(51);
  Context ctx;
  const AttentionBackwardArgs good = random_args(rng, {2, 3, 2, 2, 8, 6, true}, DType::f32);
  const auto message = [&](const auto& change) {
    AttentionBackwardArgs args = good;
    change(args);
    return message_of([&] { attention_backward(ctx, args); });
  };
  EXPECT_EQ(message([](auto&) {}), "");
  EXPECT_EQ(message([](auto& a) { a.dout = Tensor(); }), "[attention_backward] dout is missing");
  EXPECT_EQ(message([](auto& a) { a.logsumexp = Tensor(); }), "[attention_backward] logsumexp is missing");
  EXPECT_EQ(message([](auto& a) {
              a.logsumexp = Tensor::zeros({4, 2});
            }),
            "[attention_backward] logsumexp has shape (4, 2), expected (2, 4)");
  EXPECT_EQ(message([](auto& a) { a.logsumexp = a.logsumexp.to(DType::bf16); }),
            "[attention_backward] logsumexp has dtype bf16, expected f32, or f64 for the reference");
  EXPECT_EQ(message([](auto& a) {
              a.out = Tensor::zeros({2, 4, 8});
            }),
            "[attention_backward] out has shape (2, 4, 8), expected (2, 4, 6)");
  EXPECT_EQ(message([](auto& a) { a.dk = a.dq; }),
            "[attention_backward] dk has shape (2, 4, 8), expected (3, 2, 8)");
  EXPECT_EQ(message([](auto& a) {
              a.dv = Tensor::zeros({3, 2, 6}, DType::i32);
            }),
            "[attention_backward] dv has dtype i32, expected f32, f64, bf16 or f16");
  EXPECT_EQ(
      message([](auto& a) { a.k = a.k.slice(0, 0, 1); }),
      "[attention_backward] v has shape (3, 2, 6), expected (1, 2, head_dim_v): the positions and heads "
      "of k");
  EXPECT_EQ(message([](auto& a) {
              a.dq = a.dq.to(DType::f64);
              a.path = AttentionPath::simd;
            }),
            "[attention_backward] the simd path has no f64, expected f32, bf16 or f16");
  EXPECT_EQ(message_of([&] {
              attention(ctx, {.q = good.q, .k = good.k, .v = good.v, .logsumexp = Tensor::zeros({2, 3})});
            }),
            "[attention] logsumexp has shape (2, 3), expected (2, 4)");
}

}  // namespace
}  // namespace krait
