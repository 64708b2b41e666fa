#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/on_device.h"
#include "krait/core/context.h"
#include "krait/ops/causal_conv1d.h"
#include "ops/causal_conv1d/conv.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;

// The path under test: on a GPU there is one.
ConvPath fast_path() { return on_gpu() ? ConvPath::automatic : ConvPath::simd; }

CausalConv1dArgs in_f64(CausalConv1dArgs args) {
  args.x = to_f64(args.x);
  args.weight = to_f64(args.weight);
  args.bias = to_f64(args.bias);
  args.initial_states = to_f64(args.initial_states);
  args.out = {};
  args.final_states = {};
  args.path = ConvPath::reference;
  return args;
}

// The fast path against the reference in f64.
void expect_fast(const CausalConv1dArgs& args) {
  Context ctx({.threads = 2});
  const CausalConv1dResult exact = run(ctx, causal_conv1d, in_f64(args));
  EXPECT_EQ(ctx.backend(), "causal_conv1d: reference");
  CausalConv1dArgs fast = args;
  fast.path = fast_path();
  const CausalConv1dResult found = run(ctx, causal_conv1d, fast);
  if (!on_gpu()) {
    EXPECT_EQ(ctx.backend(), concat("causal_conv1d: simd (", simd_target(), ")"));
  }
  const double tolerance = rounding_of(args.x.dtype());
  EXPECT_EQ(found.out.dtype(), args.x.dtype());
  expect_close(found.out, exact.out, tolerance, "out");
  if (args.return_final_states)
    expect_close(found.final_states, exact.final_states, tolerance, "final_states");
  if (args.state_positions) expect_close(found.states, exact.states, tolerance, "states");
}

// A random case: every option, alone or with others.
CausalConv1dArgs random_case(Rng& rng, std::string& name) {
  const DType dtype = random_dtype(rng);
  const bool packed = coin(rng, 0.3);
  const std::int64_t rows = packed ? 1 : pick(rng, 0, 3);
  const bool rows_of_vectors = coin(rng, 0.3);  // channel-last, as models have it
  const std::int64_t channels = rows_of_vectors  ? 8 * pick(rng, 1, 70)
                                : coin(rng, 0.1) ? pick(rng, 500, 530)
                                                 : pick(rng, 0, 70);
  const std::int64_t length = coin(rng, 0.2) ? pick(rng, 100, 300) : pick(rng, 0, 40);
  const std::int64_t kernel = coin(rng, 0.5) ? 4 : pick(rng, 1, 9);
  const auto layout = [&] { return static_cast<int>(pick(rng, 0, 3)); };
  CausalConv1dArgs args;
  args.x = rows_of_vectors ? random_tensor(rng, {rows, length, channels}, dtype).transpose(1, 2)
                           : random_tensor(rng, {rows, channels, length}, dtype, -1, 1, layout());
  args.weight = random_tensor(rng, {channels, kernel}, coin(rng) ? dtype : DType::f32, -1, 1, layout());
  if (coin(rng)) args.bias = random_tensor(rng, {channels}, DType::f32, -1, 1, layout());
  if (coin(rng)) args.activation = Activation::silu;
  std::int64_t sequences = rows;
  if (packed) {
    std::vector<std::int64_t> offsets = random_offsets(rng, length);
    if (coin(rng, 0.3)) offsets.push_back(length);
    args.cu_seqlens = Tensor::from(offsets);
    sequences = static_cast<std::int64_t>(offsets.size()) - 1;
    if (coin(rng)) args.cu_seqlens = args.cu_seqlens.to(DType::i32);
  }
  if (coin(rng, 0.3)) {
    args.seq_idx = random_ids(rng, rows, length);
    if (coin(rng)) args.seq_idx = args.seq_idx.to(DType::i32);
    args.seq_idx = laid_out(args.seq_idx, layout());
  }
  if (coin(rng))
    args.initial_states = random_tensor(rng, {sequences, channels, kernel - 1},
                                        coin(rng) ? dtype : DType::f32, -1, 1, layout());
  if (coin(rng, 0.4) && length > 0) {
    const std::int64_t wanted = pick(rng, 0, 4);
    args.state_positions = Tensor::zeros({rows, wanted}, DType::i64);
    for (std::int64_t i = 0; i < rows * wanted; ++i)
      args.state_positions.data<std::int64_t>()[i] = pick(rng, 0, length - 1);
  }
  args.return_final_states = coin(rng);
  if (coin(rng, 0.3)) args.out = laid_out(Tensor::zeros(args.x.shape(), dtype), layout());
  name = concat("x ", args.x.shape(), " strides ", args.x.strides(), " ", dtype, " K ", kernel, " sequences ",
                sequences, args.seq_idx ? " seq_idx" : "", args.cu_seqlens ? " packed" : "",
                args.initial_states ? " initial" : "", args.state_positions ? " positions" : "",
                args.out ? " out" : "");
  return args;
}

TEST(CausalConv1d, StatesGoToTheirDestination) {
  Context ctx;
  Rng rng(9);
  for (const ConvPath path : {ConvPath::reference, fast_path()}) {
    CausalConv1dArgs args{.x = random_tensor(rng, {2, 5, 20}),
                          .weight = random_tensor(rng, {5, 4}),
                          .state_positions = Tensor::from<std::int64_t>({19, 0, 7, 7}, {2, 2}),
                          .path = path};
    const Tensor expected = run(ctx, causal_conv1d, args).states;
    // Not contiguous: taps before channels.
    args.states = Tensor::zeros({2, 2, 3, 5}).transpose(2, 3);
    const CausalConv1dResult result = run(ctx, causal_conv1d, args);
    expect_same_bits(args.states, expected, "destination");
    expect_same_bits(result.states, expected, "result");
  }
}

TEST(CausalConv1d, ReferenceIsTheFormula) {
  Context ctx;
  Rng rng(1);
  const std::int64_t D = 3;
  const std::int64_t L = 11;
  const std::int64_t K = 4;
  const Tensor x = random_tensor(rng, {1, D, L}, DType::f64);
  const Tensor w = random_tensor(rng, {D, K}, DType::f64);
  const Tensor bias = random_tensor(rng, {D}, DType::f64);
  const Tensor before = random_tensor(rng, {1, D, K - 1}, DType::f64);
  const std::vector<std::int64_t> ids = {0, 0, 0, 1, 1, 2, 2, 2, 2, 2, -1};
  const Tensor out = run(ctx, causal_conv1d,
                         {.x = x,
                          .weight = w,
                          .bias = bias,
                          .initial_states = before,
                          .seq_idx = Tensor::from(ids, {1, L}),
                          .activation = Activation::silu})
                         .out;
  const Tensor expected = Tensor::zeros({1, D, L}, DType::f64);
  for (std::int64_t c = 0; c < D; ++c) {
    for (std::int64_t t = 0; t < L; ++t) {
      const std::int64_t id = ids[static_cast<std::size_t>(t)];
      if (id < 0) continue;
      double sum = bias.data<double>()[c];
      for (std::int64_t k = 0; k < K; ++k) {
        const std::int64_t from = t - K + 1 + k;
        double tap = 0.0;
        if (from < 0)
          tap = id == 0 ? before.data<double>()[c * (K - 1) + from + K - 1] : 0.0;
        else if (ids[static_cast<std::size_t>(from)] == id)
          tap = x.data<double>()[c * L + from];
        sum += w.data<double>()[c * K + k] * tap;
      }
      expected.data<double>()[c * L + t] = sum / (1.0 + std::exp(-sum));
    }
  }
  expect_close(out, expected, 1e-13, "out");
}

TEST(CausalConv1d, FastPathOverSizesAndLayouts) {
  Rng rng(2);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const std::int64_t kernel : {1, 2, 3, 4, 5, 8}) {
      for (const std::int64_t channels : {0, 1, 7, 8, 33}) {
        for (const std::int64_t length : {0, 1, 2, 3, 4, 9, 67}) {
          for (const int layout : {0, 1, 2, 3}) {
            SCOPED_TRACE(
                concat("K ", kernel, " D ", channels, " L ", length, " layout ", layout, " ", dtype));
            expect_fast({.x = random_tensor(rng, {2, channels, length}, dtype, -1, 1, layout),
                         .weight = random_tensor(rng, {channels, kernel}, dtype),
                         .bias = random_tensor(rng, {channels}),
                         .initial_states = random_tensor(rng, {2, channels, kernel - 1}, dtype),
                         .activation = Activation::silu,
                         .return_final_states = true});
          }
        }
      }
    }
  }
}

TEST(CausalConv1d, FastPathOverRandomOptions) {
  Rng rng(3);
  for (int i = 0; i < 600; ++i) {
    std::string name;
    const CausalConv1dArgs args = random_case(rng, name);
    SCOPED_TRACE(concat("case ", i, ": ", name));
    expect_fast(args);
    if (HasFailure()) return;
  }
}

TEST(CausalConv1d, EachSimdTarget) {
  if (on_gpu()) GTEST_SKIP() << "targets of the CPU";
  on_each_target([] {
    Rng rng(4);
    for (int i = 0; i < 100; ++i) {
      std::string name;
      const CausalConv1dArgs args = random_case(rng, name);
      SCOPED_TRACE(concat("case ", i, ": ", name));
      expect_fast(args);
    }
  });
}

TEST(CausalConv1d, ThreadsAndBlocksDoNotChangeABit) {
  Rng rng(5);
  for (const int layout : {0, 2}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const CausalConv1dArgs args{.x = random_tensor(rng, {2, 530, 300}, dtype, -1, 1, layout),
                                  .weight = random_tensor(rng, {530, 4}),
                                  .activation = Activation::silu};
      Context one({.threads = 1});
      const Tensor expected = run(one, causal_conv1d, args).out;
      for (const int threads : {2, 3}) {
        Context ctx({.threads = threads});
        expect_same_bits(run(ctx, causal_conv1d, args).out, expected, concat(threads, " threads"));
      }
      // Another layout takes another route over the same sums.
      CausalConv1dArgs other = args;
      other.x = laid_out(args.x, 3);
      expect_same_bits(run(one, causal_conv1d, other).out, expected, "strided");
    }
  }
}

TEST(CausalConv1d, SplitWithStateCarriedIsOnePass) {
  Context ctx;
  Rng rng(6);
  for (const std::int64_t kernel : {1, 2, 4, 6}) {
    const Tensor x = random_tensor(rng, {2, 9, 23});
    CausalConv1dArgs args{.x = x,
                          .weight = random_tensor(rng, {9, kernel}),
                          .initial_states = random_tensor(rng, {2, 9, kernel - 1}),
                          .return_final_states = true};
    const CausalConv1dResult whole = run(ctx, causal_conv1d, args);
    for (const std::int64_t cut : {0, 1, 2, 10, 23}) {
      SCOPED_TRACE(concat("K ", kernel, " cut at ", cut));
      // The state is carried in place.
      const Tensor state = args.initial_states.clone();
      args.x = x.slice(2, 0, cut);
      CausalConv1dArgs part = args;
      part.initial_states = part.final_states = state;
      const Tensor left = run(ctx, causal_conv1d, part).out;
      part.x = x.slice(2, cut, 23);
      const Tensor right = run(ctx, causal_conv1d, part).out;
      expect_same_bits(left, whole.out.slice(2, 0, cut), "left");
      expect_same_bits(right, whole.out.slice(2, cut, 23), "right");
      expect_same_bits(state, whole.final_states, "final_states");
    }
  }
}

TEST(CausalConv1d, PackedIsSeparate) {
  Context ctx;
  Rng rng(7);
  const std::vector<std::int64_t> offsets = {0, 5, 5, 6, 40, 42};
  const Tensor x = random_tensor(rng, {1, 17, 42}, DType::f32, -1, 1, 2);
  const Tensor weight = random_tensor(rng, {17, 4});
  const Tensor initial = random_tensor(rng, {5, 17, 3});
  const CausalConv1dResult packed = run(ctx, causal_conv1d,
                                        {.x = x,
                                         .weight = weight,
                                         .initial_states = initial,
                                         .cu_seqlens = Tensor::from(offsets),
                                         .return_final_states = true});
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    SCOPED_TRACE(concat("sequence ", s));
    const auto i = static_cast<std::int64_t>(s);
    const CausalConv1dResult alone = run(ctx, causal_conv1d,
                                         {.x = x.slice(2, offsets[s], offsets[s + 1]),
                                          .weight = weight,
                                          .initial_states = initial.slice(0, i, i + 1),
                                          .return_final_states = true});
    expect_same_bits(packed.out.slice(2, offsets[s], offsets[s + 1]), alone.out, "out");
    expect_same_bits(packed.final_states.slice(0, i, i + 1), alone.final_states, "final_states");
  }
}

TEST(CausalConv1d, PaddingTokensAreAsIfTheyWereNotThere) {
  Context ctx;
  Rng rng(8);
  const Tensor x = random_tensor(rng, {1, 5, 8});
  const std::vector<std::int64_t> ids = {-1, 0, 0, -1, -1, 0, 0, -1};
  const std::vector<std::int64_t> real = {1, 2, 5, 6};
  Tensor short_x = Tensor::empty({1, 5, 4});
  for (std::size_t i = 0; i < real.size(); ++i)
    short_x.select(2, static_cast<std::int64_t>(i)).copy_from(x.select(2, real[i]));
  CausalConv1dArgs args{.x = x,
                        .weight = random_tensor(rng, {5, 4}),
                        .bias = random_tensor(rng, {5}),
                        .initial_states = random_tensor(rng, {1, 5, 3}),
                        .seq_idx = Tensor::from(ids, {1, 8}),
                        .return_final_states = true};
  const CausalConv1dResult padded = run(ctx, causal_conv1d, args);
  args.x = short_x;
  args.seq_idx = {};
  const CausalConv1dResult dense = run(ctx, causal_conv1d, args);
  for (std::size_t i = 0; i < real.size(); ++i)
    expect_same_bits(padded.out.select(2, real[i]), dense.out.select(2, static_cast<std::int64_t>(i)), "out");
  for (const std::int64_t t : {0, 3, 4, 7})
    expect_same_bits(padded.out.select(2, t), Tensor::zeros({1, 5}), "padding");
  expect_same_bits(padded.final_states, dense.final_states, "final_states");
}

// Rows of a wider matrix, as the projections write them, cut into pieces on a GPU.
TEST(CausalConv1d, ChannelLastInPieces) {
  Rng rng(11);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const std::int64_t kernel : {2, 3, 4})
      for (const std::int64_t channels : {8, 256, 264, 1032})
        for (const std::int64_t length : {1, 15, 16, 17, 130}) {
          SCOPED_TRACE(concat("K ", kernel, " D ", channels, " L ", length, " ", dtype));
          expect_fast({.x = random_tensor(rng, {2, length, channels + 16}, dtype)
                                .slice(2, 8, channels + 8)
                                .transpose(1, 2),
                       .weight = random_tensor(rng, {channels, kernel}),
                       .bias = random_tensor(rng, {channels}, dtype),
                       .initial_states = random_tensor(rng, {2, channels, kernel - 1}, dtype),
                       .activation = Activation::silu,
                       .return_final_states = true});
        }
}

TEST(CausalConv1d, ChoosesTheKernelOfAGpu) {
  using namespace conv_detail;
  const auto last = [](std::int64_t channels, DType dtype) {
    return Tensor::empty({2, 9, channels}, dtype).transpose(1, 2);
  };
  const Tensor x = last(16, DType::bf16);
  EXPECT_EQ(choose_kernel(4, {x, x}), ConvKernel::rows);
  EXPECT_EQ(choose_kernel(4, {x, {}}), ConvKernel::rows);
  EXPECT_EQ(choose_kernel(1, {x, x}), ConvKernel::plain);
  EXPECT_EQ(choose_kernel(5, {x, x}), ConvKernel::plain);
  EXPECT_EQ(choose_kernel(4, {x, last(16, DType::f32)}), ConvKernel::plain);
  EXPECT_EQ(choose_kernel(4, {last(12, DType::bf16)}), ConvKernel::plain);
  EXPECT_EQ(choose_kernel(4, {last(12, DType::f32)}), ConvKernel::rows);
  EXPECT_EQ(choose_kernel(4, {last(24, DType::bf16).slice(1, 8, 24)}), ConvKernel::rows);
  EXPECT_EQ(choose_kernel(4, {last(24, DType::bf16).slice(1, 4, 20)}), ConvKernel::plain);
  EXPECT_EQ(choose_kernel(4, {Tensor::empty({2, 16, 16})}), ConvKernel::plain);
  EXPECT_EQ(choose_tokens(8, 4096, 5376, 4, 396), 126);   // 33 pieces a row: 2,772 blocks, seven waves of 396
  EXPECT_EQ(choose_tokens(16, 2048, 1792, 4, 396), 294);  // 392 blocks, one wave
  EXPECT_EQ(choose_tokens(1, 2048, 5376, 4, 396), 60);    // one wave, of whole turns
  EXPECT_EQ(choose_tokens(1, 512, 1536, 4, 396), 12);     // never less
  EXPECT_EQ(choose_tokens(1, 0, 8, 4, 396), 12);
  EXPECT_EQ(choose_tokens(0, 16, 8, 4, 396), 12);
}

TEST(CausalConv1d, OutKeepsTheLayoutOfX) {
  Context ctx;
  Rng rng(9);
  const Tensor weight = random_tensor(rng, {6, 2});
  EXPECT_EQ(run(ctx, causal_conv1d, {.x = Tensor::zeros({2, 6, 5}), .weight = weight}).out.strides(),
            (Dims{30, 5, 1}));
  EXPECT_EQ(run(ctx, causal_conv1d, {.x = Tensor::zeros({2, 5, 6}).transpose(1, 2), .weight = weight})
                .out.strides(),
            (Dims{30, 1, 6}));
}

TEST(CausalConv1d, MessagesNameWhatWasFound) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 3, 8});
  const Tensor w = Tensor::zeros({3, 4});
  const auto message = [&](CausalConv1dArgs args) {
    if (!args.x) args.x = x;
    if (!args.weight) args.weight = w;
    return message_of([&] { (void)causal_conv1d(ctx, args); });
  };
  EXPECT_EQ(message({.x = Tensor::zeros({2, 3})}), "[causal_conv1d] x has shape (2, 3), expected (B, D, L)");
  EXPECT_EQ(message({.x = Tensor::zeros({2, 3, 8}, DType::i32)}),
            "[causal_conv1d] x has dtype i32, expected f32, f64, bf16 or f16");
  EXPECT_EQ(message({.weight = Tensor::zeros({4, 4})}),
            "[causal_conv1d] weight has shape (4, 4), expected (3, K): one row for each channel");
  EXPECT_EQ(message({.weight = Tensor::zeros({3, 0})}),
            "[causal_conv1d] weight has shape (3, 0), expected K >= 1");
  EXPECT_EQ(message({.weight = Tensor::zeros({3, 4}, DType::f64)}),
            "[causal_conv1d] weight has dtype f64 beside x of f32: f64 needs x in f64 too");
  EXPECT_EQ(message({.bias = Tensor::zeros({4})}),
            "[causal_conv1d] bias has shape (4,), expected (3,): one value for each channel");
  EXPECT_EQ(message({.initial_states = Tensor::zeros({2, 3, 4})}),
            "[causal_conv1d] initial_states has shape (2, 3, 4), expected (2, 3, 3): the K - 1 inputs before "
            "each sequence");
  EXPECT_EQ(message({.seq_idx = Tensor::zeros({2, 7}, DType::i32)}),
            "[causal_conv1d] seq_idx has shape (2, 7), expected (2, 8)");
  EXPECT_EQ(message({.seq_idx = Tensor::zeros({2, 8})}),
            "[causal_conv1d] seq_idx has dtype f32, expected i32 or i64");
  EXPECT_EQ(message({.cu_seqlens = Tensor::from<std::int64_t>({0, 8})}),
            "[causal_conv1d] cu_seqlens needs a batch of 1, found 2");
  const Tensor row = Tensor::zeros({1, 3, 8});
  EXPECT_EQ(message({.x = row, .cu_seqlens = Tensor::from<std::int64_t>({0, 5, 3, 8})}),
            "[causal_conv1d] cu_seqlens decreases from 5 to 3 at 2");
  EXPECT_EQ(message({.x = row, .cu_seqlens = Tensor::from<std::int64_t>({0, 5})}),
            "[causal_conv1d] cu_seqlens ends with 5, expected 8 tokens");
  EXPECT_EQ(message({.x = row, .cu_seqlens = Tensor::from<std::int64_t>({1, 8})}),
            "[causal_conv1d] cu_seqlens starts with 1, expected 0");
  EXPECT_EQ(message({.x = row, .states = row}),
            "[causal_conv1d] states is given without state_positions, expected both");
  EXPECT_EQ(message({.x = row, .state_positions = Tensor::from<std::int64_t>({0, 8}, {1, 2})}),
            "[causal_conv1d] state_positions[0, 1] is 8, expected 0 to 7");
  EXPECT_NE(message({.out = x}).find("out overlaps x"), std::string::npos);
  EXPECT_EQ(message({.out = Tensor::zeros({2, 3, 8}, DType::bf16)}),
            "[causal_conv1d] out has dtype bf16, expected f32 as x");
  const Tensor states = Tensor::zeros({2, 3, 4});
  EXPECT_EQ(message({.initial_states = states.slice(2, 0, 3), .final_states = states.slice(2, 1, 4)}),
            "[causal_conv1d] final_states overlaps initial_states without being the same view");
  EXPECT_EQ(message({.x = x.to(DType::f64), .path = ConvPath::simd}),
            "[causal_conv1d] the path simd takes f32, bf16 or f16, x has dtype f64");
}

TEST(CausalConv1d, OutMayBeOtherColumnsOfTheSameMatrix) {
  Context ctx;
  Rng rng(10);
  const Tensor wide = random_tensor(rng, {7, 12});
  const Tensor x = wide.slice(1, 0, 6).transpose(0, 1).unsqueeze(0);
  const Tensor out = wide.slice(1, 6, 12).transpose(0, 1).unsqueeze(0);
  const Tensor weight = random_tensor(rng, {6, 4});
  const Tensor expected = run(ctx, causal_conv1d, {.x = x.clone(), .weight = weight}).out;
  (void)run(ctx, causal_conv1d, {.x = x, .weight = weight, .out = out});
  expect_same_bits(out, expected, "out");
  const std::string overlap = message_of([&] {
    (void)run(ctx, causal_conv1d,
              {.x = x, .weight = weight, .out = wide.slice(1, 5, 11).transpose(0, 1).unsqueeze(0)});
  });
  EXPECT_NE(overlap.find("out overlaps x"), std::string::npos);
}

}  // namespace
}  // namespace krait
