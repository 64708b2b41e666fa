#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/on_device.h"
#include "krait/core/context.h"
#include "krait/ops/causal_conv1d.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;

// The path under test: on a GPU there is one.
ConvPath fast_path() { return on_gpu() ? ConvPath::automatic : ConvPath::simd; }

CausalConv1dUpdateArgs random_case(Rng& rng, std::string& name) {
  const DType dtype = random_dtype(rng);
  const DType state_dtype = random_dtype(rng);
  const auto layout = [&] { return static_cast<int>(pick(rng, 0, 3)); };
  const std::int64_t rows = pick(rng, 0, 4);
  const std::int64_t channels = pick(rng, 0, 140);
  const std::int64_t kernel = pick(rng, 1, 6);
  const std::int64_t states = kernel - 1 + pick(rng, 0, 3);
  const std::int64_t tokens = pick(rng, 0, 7);
  CausalConv1dUpdateArgs args;
  const bool single = coin(rng);
  args.x = random_tensor(rng, single ? Dims{rows, channels} : Dims{rows, channels, tokens}, dtype, -1, 1,
                         layout());
  args.weight = random_tensor(rng, {channels, kernel}, DType::f32, -1, 1, layout());
  if (coin(rng)) args.bias = random_tensor(rng, {channels});
  if (coin(rng)) args.activation = Activation::silu;
  std::int64_t state_rows = rows;
  if (coin(rng)) {
    state_rows = rows + 3;
    std::vector<std::int32_t> indices;
    for (std::int64_t b = 0; b < rows; ++b)
      indices.push_back(coin(rng, 0.25) ? -1 : static_cast<std::int32_t>(state_rows - 1 - b));
    args.conv_state_indices = Tensor::from(indices);
  }
  if (coin(rng)) {
    std::vector<std::int64_t> written;
    for (std::int64_t b = 0; b < rows; ++b) written.push_back(pick(rng, 0, 20));
    args.cache_seqlens = Tensor::from(written);
  }
  if (coin(rng, 0.3)) {
    std::vector<std::int32_t> ids;
    for (std::int64_t b = 0; b < rows; ++b) ids.push_back(coin(rng, 0.3) ? -1 : 0);
    args.seq_idx = Tensor::from(ids);
  }
  args.conv_state = random_tensor(rng, {state_rows, channels, states}, state_dtype, -1, 1, layout());
  name = concat("x ", args.x.shape(), " ", dtype, " state ", args.conv_state.shape(), " ", state_dtype,
                " strides ", args.conv_state.strides(), " K ", kernel, args.cache_seqlens ? " ring" : "",
                args.conv_state_indices ? " indices" : "", args.seq_idx ? " seq_idx" : "");
  return args;
}

void expect_fast(const CausalConv1dUpdateArgs& args) {
  Context ctx({.threads = 2});
  CausalConv1dUpdateArgs exact = args;
  exact.x = args.x.to(DType::f64);
  exact.weight = args.weight.to(DType::f64);
  if (args.bias) exact.bias = args.bias.to(DType::f64);
  exact.conv_state = args.conv_state.to(DType::f64);
  exact.path = ConvPath::reference;
  CausalConv1dUpdateArgs fast = args;
  fast.path = fast_path();
  const Tensor expected = run(ctx, causal_conv1d_update, exact);
  const Tensor found = run(ctx, causal_conv1d_update, fast);
  expect_close(found, expected, rounding_of(args.x.dtype()), "out");
  expect_close(args.conv_state, exact.conv_state, rounding_of(args.conv_state.dtype()), "conv_state");
}

TEST(CausalConv1dUpdate, FastPathOverRandomOptions) {
  Rng rng(1);
  for (int i = 0; i < 600; ++i) {
    std::string name;
    const CausalConv1dUpdateArgs args = random_case(rng, name);
    SCOPED_TRACE(concat("case ", i, ": ", name));
    expect_fast(args);
    if (HasFailure()) return;
  }
}

// As layers decode on a GPU: four taps, one token, channels side by side, more rows of state than entries.
TEST(CausalConv1dUpdate, ChannelsSideBySide) {
  Rng rng(17);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const DType weight_dtype : {DType::f32, DType::f16})
      for (const std::int64_t channels : {4, 132, 516, 518}) {
        SCOPED_TRACE(concat(dtype, " ", weight_dtype, " ", channels));
        constexpr std::int64_t kRows = 5;
        // A slice of a wider row, as in_proj leaves it.
        const Tensor wide = random_tensor(rng, {kRows, channels + 24}, dtype, -1, 1);
        const Tensor line = random_tensor(rng, {kRows + 2, 3, channels}, DType::f32, -1, 1);
        CausalConv1dUpdateArgs args{
            .x = wide.slice(1, 8, channels + 8),
            .conv_state = line.transpose(1, 2),
            .weight = random_tensor(rng, {channels, 4}, weight_dtype, -1, 1),
            .bias = channels == 132 ? Tensor() : random_tensor(rng, {channels}, dtype, -1, 1),
            .activation = Activation::silu,
            .conv_state_indices = Tensor::from<std::int64_t>({6, -1, 0, 3, 2})};
        CausalConv1dUpdateArgs exact = args;
        for (Tensor* t : {&exact.x, &exact.conv_state, &exact.weight, &exact.bias})
          if (*t) *t = t->to(DType::f64);
        exact.path = ConvPath::reference;
        CausalConv1dUpdateArgs again = args;
        again.conv_state = line.clone().transpose(1, 2);
        Context ctx;
        const Tensor expected = run(ctx, causal_conv1d_update, exact);
        const Tensor out = run(ctx, causal_conv1d_update, args);
        expect_close(out, expected, rounding_of(dtype), "out");
        expect_close(args.conv_state, exact.conv_state, rounding_of(DType::f32), "conv_state");
        expect_same_bits(run(ctx, causal_conv1d_update, again), out, "out twice");
        expect_same_bits(again.conv_state, args.conv_state, "conv_state twice");
      }
}

TEST(CausalConv1dUpdate, EachSimdTarget) {
  if (on_gpu()) GTEST_SKIP() << "targets of the CPU";
  on_each_target([] {
    Rng rng(2);
    for (int i = 0; i < 100; ++i) {
      std::string name;
      const CausalConv1dUpdateArgs args = random_case(rng, name);
      SCOPED_TRACE(concat("case ", i, ": ", name));
      expect_fast(args);
    }
  });
}

TEST(CausalConv1dUpdate, StepsAreTheForwardPass) {
  Rng rng(3);
  for (const ConvPath path : {ConvPath::reference, fast_path()}) {
    for (const bool ring : {false, true}) {
      for (const std::int64_t states : {3, 5}) {
        for (const std::int64_t step : {1, 2, 7}) {
          SCOPED_TRACE(
              concat(ring ? "ring" : "shift", " S ", states, " T ", step, " path ", static_cast<int>(path)));
          Context ctx;
          const Tensor x = random_tensor(rng, {2, 10, 14});
          const Tensor weight = random_tensor(rng, {10, 4});
          const Tensor bias = random_tensor(rng, {10});
          const Tensor expected =
              run(ctx, causal_conv1d,
                  {.x = x, .weight = weight, .bias = bias, .activation = Activation::silu, .path = path})
                  .out;
          const Tensor state = Tensor::zeros({2, 10, states});
          for (std::int64_t t = 0; t < 14; t += step) {
            const Tensor out =
                run(ctx, causal_conv1d_update,
                    {.x = x.slice(2, t, t + step),
                     .conv_state = state,
                     .weight = weight,
                     .bias = bias,
                     .activation = Activation::silu,
                     .cache_seqlens = ring ? Tensor::from(std::vector<std::int64_t>{t, t}) : Tensor(),
                     .path = path});
            expect_same_bits(out, expected.slice(2, t, t + step), concat("tokens from ", t));
          }
          if (!ring) expect_same_bits(state, x.slice(2, 14 - states, 14), "conv_state");
        }
      }
    }
  }
}

TEST(CausalConv1dUpdate, PaddingSlotsGiveZeroAndLeaveTheState) {
  Context ctx;
  Rng rng(4);
  const Tensor state = random_tensor(rng, {4, 6, 3});
  const Tensor before = state.clone();
  const Tensor out = run(ctx, causal_conv1d_update,
                         {.x = random_tensor(rng, {3, 6}),
                          .conv_state = state,
                          .weight = random_tensor(rng, {6, 4}),
                          .bias = random_tensor(rng, {6}),
                          .activation = Activation::silu,
                          .conv_state_indices = Tensor::from<std::int64_t>({-1, 2, 0}),
                          .seq_idx = Tensor::from<std::int32_t>({0, 0, -1})});
  expect_same_bits(out.select(0, 0), Tensor::zeros({6}), "out of a negative index");
  expect_same_bits(out.select(0, 2), Tensor::zeros({6}), "out of a negative seq_idx");
  for (const std::int64_t row : {0, 1, 3})
    expect_same_bits(state.select(0, row), before.select(0, row), concat("state row ", row));
  EXPECT_NE(std::memcmp(state.select(0, 2).raw(), before.select(0, 2).raw(), 18 * sizeof(float)), 0);
}

// What the host cannot look at without waiting for the GPU is a padding slot there.
TEST(CausalConv1dUpdate, IndicesOutOfRangeAreHarmlessOnAGpu) {
  if (!on_gpu()) GTEST_SKIP() << "an error on the CPU";
  Context ctx;
  Rng rng(6);
  const Tensor state = random_tensor(rng, {4, 6, 3});
  const Tensor before = state.clone();
  const Tensor out = run(ctx, causal_conv1d_update,
                         {.x = random_tensor(rng, {3, 6}),
                          .conv_state = state,
                          .weight = random_tensor(rng, {6, 4}),
                          .cache_seqlens = Tensor::from<std::int64_t>({0, 7, -1}),
                          .conv_state_indices = Tensor::from<std::int64_t>({4, 1 << 30, 0})});
  expect_same_bits(out, Tensor::zeros({3, 6}), "out");
  expect_same_bits(state, before, "conv_state");
}

TEST(CausalConv1dUpdate, ThreadsDoNotChangeABit) {
  Rng rng(5);
  const Tensor x = random_tensor(rng, {64, 530});
  const Tensor weight = random_tensor(rng, {530, 4});
  const Tensor start = random_tensor(rng, {64, 530, 4});
  Tensor expected;
  Tensor expected_state;
  for (const int threads : {1, 2, 3}) {
    Context ctx({.threads = threads});
    const Tensor state = start.clone();
    const Tensor out = run(ctx, causal_conv1d_update, {.x = x, .conv_state = state, .weight = weight});
    if (threads == 1) {
      expected = out;
      expected_state = state;
    }
    expect_same_bits(out, expected, concat(threads, " threads"));
    expect_same_bits(state, expected_state, concat(threads, " threads, state"));
  }
}

TEST(CausalConv1dUpdate, MessagesNameWhatWasFound) {
  Context ctx;
  const auto message = [&](CausalConv1dUpdateArgs args) {
    if (!args.x) args.x = Tensor::zeros({2, 3});
    if (!args.conv_state) args.conv_state = Tensor::zeros({2, 3, 3});
    if (!args.weight) args.weight = Tensor::zeros({3, 4});
    return message_of([&] { (void)causal_conv1d_update(ctx, args); });
  };
  EXPECT_EQ(message({.x = Tensor::zeros({2})}),
            "[causal_conv1d_update] x has shape (2,), expected (B, D) or (B, D, T)");
  EXPECT_EQ(message({.conv_state = Tensor::zeros({2, 3, 2})}),
            "[causal_conv1d_update] conv_state has shape (2, 3, 2), expected (R, 3, S) with S >= K - 1 = 3");
  EXPECT_EQ(message({.conv_state = Tensor::zeros({5, 3, 3})}),
            "[causal_conv1d_update] conv_state has 5 rows, expected 2: one for each batch row");
  EXPECT_EQ(message({.conv_state_indices = Tensor::from<std::int64_t>({0, 2})}),
            "[causal_conv1d_update] conv_state_indices[1] is 2, expected less than the 2 rows of conv_state");
  EXPECT_EQ(message({.conv_state_indices = Tensor::from<std::int64_t>({1, 1})}),
            "[causal_conv1d_update] conv_state_indices names row 1 twice: two batch rows would update one "
            "state");
  EXPECT_EQ(message({.cache_seqlens = Tensor::from<std::int64_t>({0, -1})}),
            "[causal_conv1d_update] cache_seqlens[1] is -1, expected 0 or more");
  EXPECT_EQ(
      message({.cache_seqlens = Tensor::from<std::int64_t>({0})}),
      "[causal_conv1d_update] cache_seqlens has shape (1,), expected (2,): one value for each batch row");
  EXPECT_EQ(message({.seq_idx = Tensor::zeros({2})}),
            "[causal_conv1d_update] seq_idx has dtype f32, expected i32 or i64");
  EXPECT_EQ(message({.out = Tensor::zeros({2, 4})}),
            "[causal_conv1d_update] out has shape (2, 4) and dtype f32, expected (2, 3) and f32 as x");
  const Tensor state = Tensor::zeros({2, 3, 3});
  EXPECT_EQ(message({.x = state.select(2, 0), .conv_state = state}),
            "[causal_conv1d_update] conv_state overlaps x");
}

TEST(CausalConv1dVarlenStates, LastInputsOfEachSequence) {
  Context cpu;
  Context& ctx = on_gpu() ? gpu_context() : cpu;
  const Tensor x = Tensor::empty({6, 2});
  for (int i = 0; i < 12; ++i) x.data<float>()[i] = static_cast<float>(i + 1);
  const Tensor states = ctx.to_host(
      causal_conv1d_varlen_states(ctx, ctx.to_device(x), Tensor::from<std::int32_t>({0, 1, 1, 6}), 3));
  const std::vector<float> expected = {0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 7, 9, 11, 8, 10, 12};
  expect_same_bits(states, Tensor::from(expected, {3, 2, 3}), "states");
  EXPECT_EQ(message_of([&] {
              (void)causal_conv1d_varlen_states(ctx, ctx.to_device(x), Tensor::from<std::int32_t>({0, 5}), 3);
            }),
            "[causal_conv1d_varlen_states] cu_seqlens ends with 5, expected 6 tokens");
  const Tensor out = ctx.to_device(Tensor::from(std::vector<float>(18, 9.0F), {3, 3, 2})).transpose(1, 2);
  (void)causal_conv1d_varlen_states(ctx, ctx.to_device(x), Tensor::from<std::int32_t>({0, 1, 1, 6}), 3, out);
  expect_same_bits(ctx.to_host(out), states, "destination");
  EXPECT_EQ(
      message_of([&] {
        (void)causal_conv1d_varlen_states(ctx, ctx.to_device(x), Tensor::from<std::int32_t>({0, 1, 1, 6}), 2,
                                          out);
      }),
      "[causal_conv1d_varlen_states] out has shape (3, 2, 3) and dtype f32, expected (3, 2, 2) and f32, "
      "f64, bf16 or f16");
}

}  // namespace
}  // namespace krait
