#include <gtest/gtest.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "core/on_device.h"
#include "krait/core/context.h"
#include "krait/ops/causal_conv1d.h"
#include "ops/finite_difference.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;

// The path under test: on a GPU there is one.
ConvPath fast_path() { return on_gpu() ? ConvPath::automatic : ConvPath::simd; }

Tensor wide(const Tensor& t) { return t ? t.to(DType::f64).clone() : Tensor(); }

// cu_seqlens, at times with an empty sequence at the end.
Tensor packed_offsets(Rng& rng, std::int64_t length) {
  std::vector<std::int64_t> offsets = random_offsets(rng, length);
  if (coin(rng, 0.3)) offsets.push_back(length);
  return Tensor::from(offsets);
}

std::string name_of(const CausalConv1dBackwardArgs& args) {
  return concat("x ", args.x.shape(), " strides ", args.x.strides(), " ", args.x.dtype(), " dout ",
                args.dout.dtype(), " K ", args.weight.size(1), args.bias ? " bias" : "",
                args.activation == Activation::silu ? " silu" : "", args.seq_idx ? " seq_idx" : "",
                args.cu_seqlens ? " packed" : "", args.initial_states ? " initial" : "",
                args.dfinal_states ? " dfinal" : "", args.dinitial_states ? " dinitial" : "");
}

TEST(CausalConv1dBackward, ReferenceIsTheGradient) {
  Context ctx;
  Rng rng(1);
  for (int trial = 0; trial < 60; ++trial) {
    const bool packed = coin(rng, 0.4);
    const std::int64_t rows = packed ? 1 : 2;
    const std::int64_t length = pick(rng, 0, 9);
    const std::int64_t channels = 2;
    const std::int64_t kernel = pick(rng, 1, 4);
    const auto tensor = [&](const Dims& shape) { return random_tensor(rng, shape, DType::f64, -1.5, 1.5); };
    CausalConv1dArgs forward{.x = tensor({rows, channels, length}),
                             .weight = tensor({channels, kernel}),
                             .activation = coin(rng) ? Activation::silu : Activation::none,
                             .return_final_states = true};
    if (coin(rng)) forward.bias = tensor({channels});
    if (packed) forward.cu_seqlens = packed_offsets(rng, length);
    if (coin(rng, 0.4)) forward.seq_idx = random_ids(rng, rows, length);
    const std::int64_t sequences = packed ? forward.cu_seqlens.size(0) - 1 : rows;
    const Dims state_shape{sequences, channels, kernel - 1};
    if (coin(rng, 0.7)) forward.initial_states = tensor(state_shape);

    CausalConv1dBackwardArgs args{.x = forward.x,
                                  .weight = forward.weight,
                                  .bias = forward.bias,
                                  .initial_states = forward.initial_states,
                                  .seq_idx = forward.seq_idx,
                                  .cu_seqlens = forward.cu_seqlens,
                                  .activation = forward.activation,
                                  .dout = tensor(forward.x.shape()),
                                  .dx = tensor(forward.x.shape()),
                                  .dweight = tensor({channels, kernel}),
                                  .dbias = tensor({channels}),
                                  .dinitial_states = tensor(state_shape)};
    if (coin(rng, 0.7)) args.dfinal_states = tensor(state_shape);
    SCOPED_TRACE(concat("trial ", trial, ": ", name_of(args)));
    const Tensor dweight_before = args.dweight.clone();
    const Tensor dbias_before = args.dbias.clone();
    run(ctx, causal_conv1d_backward, args);
    EXPECT_EQ(ctx.backend(), "causal_conv1d_backward: reference");

    // Absent bias and initial states are zeros, and have gradients.
    CausalConv1dArgs varied = forward;
    if (!varied.bias) varied.bias = Tensor::zeros({channels}, DType::f64);
    if (!varied.initial_states) varied.initial_states = Tensor::zeros(state_shape, DType::f64);
    const auto loss = [&] {
      const CausalConv1dResult result = run(ctx, causal_conv1d, varied);
      return test::weighted_sum(result.out, args.dout) +
             (args.dfinal_states ? test::weighted_sum(result.final_states, args.dfinal_states) : 0.0) +
             test::weighted_sum(varied.weight, dweight_before) +
             test::weighted_sum(varied.bias, dbias_before);
    };
    test::expect_gradient(loss, varied.x, args.dx, "dx");
    test::expect_gradient(loss, varied.weight, args.dweight, "dweight");
    test::expect_gradient(loss, varied.bias, args.dbias, "dbias");
    test::expect_gradient(loss, varied.initial_states, args.dinitial_states, "dinitial_states");
    if (HasFailure()) return;
  }
}

// The fast path against the reference in f64.
void expect_fast(const CausalConv1dBackwardArgs& args) {
  Context ctx({.threads = 2});
  CausalConv1dBackwardArgs exact = args;
  for (Tensor* t : {&exact.x, &exact.weight, &exact.bias, &exact.initial_states, &exact.dout,
                    &exact.dfinal_states, &exact.dx, &exact.dweight, &exact.dbias, &exact.dinitial_states})
    *t = wide(*t);
  exact.path = ConvPath::reference;
  run(ctx, causal_conv1d_backward, exact);
  CausalConv1dBackwardArgs fast = args;
  fast.path = fast_path();
  run(ctx, causal_conv1d_backward, fast);
  if (!on_gpu()) {
    EXPECT_EQ(ctx.backend(), concat("causal_conv1d_backward: simd (", simd_target(), ")"));
  }
  const auto compare = [](const Tensor& found, const Tensor& expected, const char* name) {
    if (found) expect_close(found, expected, 4e-6 + rounding_of(found.dtype()), name);
  };
  compare(args.dx, exact.dx, "dx");
  compare(args.dinitial_states, exact.dinitial_states, "dinitial_states");
  // Sums of up to 2,100 terms that may cancel.
  if (args.dweight) expect_close(args.dweight, exact.dweight, 2e-5, "dweight");
  if (args.dbias) expect_close(args.dbias, exact.dbias, 2e-5, "dbias");
}

// A random case: every option, alone or with others.
CausalConv1dBackwardArgs random_case(Rng& rng) {
  const auto dtype = [&] { return coin(rng) ? DType::f32 : random_dtype(rng); };
  const auto layout = [&] { return static_cast<int>(pick(rng, 0, 3)); };
  const bool packed = coin(rng, 0.3);
  const std::int64_t rows = packed ? 1 : pick(rng, 0, 3);
  const std::int64_t channels = coin(rng, 0.1) ? pick(rng, 120, 140) : pick(rng, 0, 70);
  const std::int64_t length = coin(rng, 0.2) ? pick(rng, 100, 700) : pick(rng, 0, 40);
  const std::int64_t kernel = coin(rng, 0.5) ? 4 : coin(rng, 0.9) ? pick(rng, 1, 9) : pick(rng, 30, 40);
  const auto tensor = [&](const Dims& shape, DType type) {
    return random_tensor(rng, shape, type, -1, 1, layout());
  };
  const Dims shape{rows, channels, length};
  CausalConv1dBackwardArgs args{.x = tensor(shape, dtype()),
                                .weight = tensor({channels, kernel}, dtype()),
                                .dout = tensor(shape, dtype())};
  if (coin(rng)) args.bias = tensor({channels}, dtype());
  if (coin(rng)) args.activation = Activation::silu;
  if (packed) {
    args.cu_seqlens = packed_offsets(rng, length);
    if (coin(rng)) args.cu_seqlens = args.cu_seqlens.to(DType::i32);
  }
  if (coin(rng, 0.3)) args.seq_idx = laid_out(random_ids(rng, rows, length), layout());
  const Dims state_shape{packed ? args.cu_seqlens.size(0) - 1 : rows, channels, kernel - 1};
  if (coin(rng)) args.initial_states = tensor(state_shape, dtype());
  if (coin(rng)) args.dfinal_states = tensor(state_shape, dtype());
  if (coin(rng, 0.8)) args.dx = tensor(shape, dtype());
  if (coin(rng, 0.8)) args.dweight = tensor({channels, kernel}, DType::f32);
  if (coin(rng, 0.8)) args.dbias = tensor({channels}, DType::f32);
  if (coin(rng, 0.8)) args.dinitial_states = tensor(state_shape, dtype());
  return args;
}

TEST(CausalConv1dBackward, FastPathOverSizesAndLayouts) {
  Rng rng(2);
  for (const std::int64_t kernel : {1, 2, 3, 4, 5, 8})
    for (const std::int64_t channels : {0, 1, 7, 8, 33, 130})
      for (const std::int64_t length : {0, 1, 2, 3, 4, 12, 13, 14, 16, 17, 67})
        for (const int layout : {0, 2, 3}) {
          SCOPED_TRACE(concat("K ", kernel, " D ", channels, " L ", length, " layout ", layout));
          const auto tensor = [&](const Dims& shape) {
            return random_tensor(rng, shape, DType::f32, -1, 1, layout);
          };
          const Dims shape{2, channels, length};
          const Dims state_shape{2, channels, kernel - 1};
          expect_fast({.x = tensor(shape),
                       .weight = tensor({channels, kernel}),
                       .bias = tensor({channels}),
                       .initial_states = tensor(state_shape),
                       .activation = Activation::silu,
                       .dout = tensor(shape),
                       .dfinal_states = tensor(state_shape),
                       .dx = tensor(shape),
                       .dweight = tensor({channels, kernel}),
                       .dbias = tensor({channels}),
                       .dinitial_states = tensor(state_shape)});
          if (HasFailure()) return;
        }
}

// Rows of a wider matrix in one dtype, cut into pieces on a GPU; dx in memory of its own and in dout's place.
TEST(CausalConv1dBackward, ChannelLastInPieces) {
  Rng rng(12);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const std::int64_t kernel : {2, 3, 4})
      for (const std::int64_t channels : {8, 128, 264})
        for (const std::int64_t length : {1, 3, 16, 18, 131})
          for (const bool in_place : {false, true}) {
            SCOPED_TRACE(concat("K ", kernel, " D ", channels, " L ", length, " ", dtype,
                                in_place ? " in place" : ""));
            const auto rows = [&] {
              return random_tensor(rng, {2, length, channels + 16}, dtype)
                  .slice(2, 8, channels + 8)
                  .transpose(1, 2);
            };
            const Dims state_shape{2, channels, kernel - 1};
            CausalConv1dBackwardArgs args{.x = rows(),
                                          .weight = random_tensor(rng, {channels, kernel}),
                                          .bias = random_tensor(rng, {channels}, dtype),
                                          .initial_states = random_tensor(rng, state_shape, dtype),
                                          .activation = Activation::silu,
                                          .dout = rows(),
                                          .dfinal_states = random_tensor(rng, state_shape, dtype),
                                          .dx = rows(),
                                          .dweight = random_tensor(rng, {channels, kernel}),
                                          .dbias = random_tensor(rng, {channels}),
                                          .dinitial_states = random_tensor(rng, state_shape)};
            if (length == 18) {
              args.seq_idx = random_ids(rng, 2, length);
              args.activation = Activation::none;
            }
            if (in_place) {
              Context ctx;
              CausalConv1dBackwardArgs placed = args;
              placed.dx = placed.dout = args.dout.clone().transpose(1, 2).clone().transpose(1, 2);
              placed.dweight = args.dweight.clone();
              placed.dbias = {};
              placed.dinitial_states = {};
              run(ctx, causal_conv1d_backward, args);
              run(ctx, causal_conv1d_backward, placed);
              expect_same_bits(placed.dx, args.dx, "dx");
              expect_same_bits(placed.dweight, args.dweight, "dweight");
            } else {
              expect_fast(args);
            }
            if (HasFailure()) return;
          }
}

TEST(CausalConv1dBackward, FastPathOverRandomOptions) {
  Rng rng(3);
  for (int i = 0; i < 400; ++i) {
    const CausalConv1dBackwardArgs args = random_case(rng);
    SCOPED_TRACE(concat("case ", i, ": ", name_of(args)));
    expect_fast(args);
    if (HasFailure()) return;
  }
}

TEST(CausalConv1dBackward, EachSimdTarget) {
  if (on_gpu()) GTEST_SKIP() << "targets of the CPU";
  on_each_target([] {
    Rng rng(4);
    for (int i = 0; i < 60; ++i) {
      const CausalConv1dBackwardArgs args = random_case(rng);
      SCOPED_TRACE(concat("case ", i, ": ", name_of(args)));
      expect_fast(args);
      if (HasFailure()) return;
    }
  });
}

TEST(CausalConv1dBackward, ReferenceTakesEveryDtype) {
  Context ctx;
  Rng rng(5);
  for (int i = 0; i < 20; ++i) {
    CausalConv1dBackwardArgs args = random_case(rng);
    args.path = ConvPath::reference;
    CausalConv1dBackwardArgs exact = args;
    for (Tensor* t : {&exact.x, &exact.weight, &exact.bias, &exact.initial_states, &exact.dout,
                      &exact.dfinal_states, &exact.dx, &exact.dweight, &exact.dbias, &exact.dinitial_states})
      *t = wide(*t);
    SCOPED_TRACE(concat("case ", i, ": ", name_of(args)));
    run(ctx, causal_conv1d_backward, exact);
    run(ctx, causal_conv1d_backward, args);
    if (args.dx) expect_close(args.dx, exact.dx, rounding_of(args.dx.dtype()), "dx");
    if (args.dweight) expect_close(args.dweight, exact.dweight, 1e-6, "dweight");
    if (args.dbias) expect_close(args.dbias, exact.dbias, 1e-6, "dbias");
    if (args.dinitial_states)
      expect_close(args.dinitial_states, exact.dinitial_states, rounding_of(args.dinitial_states.dtype()),
                   "dinitial_states");
  }
}

// dx takes dout's place and dinitial_states dfinal_states', where the runs that read the one and write the
// other are many.
TEST(CausalConv1dBackward, InPlace) {
  Rng rng(6);
  for (const ConvPath path : {ConvPath::reference, fast_path()})
    for (int i = 0; i < 100; ++i) {
      CausalConv1dBackwardArgs args = random_case(rng);
      const Dims state_shape{args.cu_seqlens ? args.cu_seqlens.size(0) - 1 : args.x.size(0), args.x.size(1),
                             args.weight.size(1) - 1};
      const int layout = i % 4;
      args.dout = random_tensor(rng, args.x.shape(), DType::f32, -1, 1, layout);
      args.dfinal_states = random_tensor(rng, state_shape, DType::f32, -1, 1, layout);
      args.dx = Tensor::empty(args.x.shape());
      args.dinitial_states = Tensor::empty(state_shape);
      args.path = path;
      SCOPED_TRACE(concat("case ", i, ": ", name_of(args)));
      Context ctx({.threads = 3});
      CausalConv1dBackwardArgs placed = args;
      if (args.dweight) placed.dweight = args.dweight.clone();
      if (args.dbias) placed.dbias = args.dbias.clone();
      run(ctx, causal_conv1d_backward, args);
      placed.dx = placed.dout = laid_out(args.dout.clone(), layout);
      placed.dinitial_states = placed.dfinal_states = laid_out(args.dfinal_states.clone(), layout);
      run(ctx, causal_conv1d_backward, placed);
      expect_same_bits(placed.dx, args.dx, "dx");
      expect_same_bits(placed.dinitial_states, args.dinitial_states, "dinitial_states");
      if (args.dweight) expect_same_bits(placed.dweight, args.dweight, "dweight");
      if (args.dbias) expect_same_bits(placed.dbias, args.dbias, "dbias");
      if (HasFailure()) return;
    }
}

TEST(CausalConv1dBackward, ThreadsDoNotChangeABit) {
  Rng rng(7);
  const std::vector<std::int64_t> offsets = {0, 3, 600, 601, 1100, 1100, 1390, 1400};
  for (const bool packed : {false, true}) {
    SCOPED_TRACE(packed ? "packed" : "rows");
    const Dims shape = packed ? Dims{1, 190, 1400} : Dims{3, 190, 300};
    const std::int64_t sequences = packed ? 7 : 3;
    CausalConv1dBackwardArgs args{.x = random_tensor(rng, shape, DType::f32, -1, 1, 2),
                                  .weight = random_tensor(rng, {190, 4}),
                                  .activation = Activation::silu,
                                  .dout = random_tensor(rng, shape, DType::f32, -1, 1, 2),
                                  .dfinal_states = random_tensor(rng, {sequences, 190, 3})};
    if (packed) args.cu_seqlens = Tensor::from(offsets);
    const Tensor dweight = random_tensor(rng, {190, 4});
    const Tensor dbias = random_tensor(rng, {190});
    CausalConv1dBackwardArgs first;
    for (const int threads : {1, 2, 3, 7}) {
      Context ctx({.threads = threads});
      CausalConv1dBackwardArgs found = args;
      found.dx = Tensor::empty(shape);
      found.dinitial_states = Tensor::empty({sequences, 190, 3});
      found.dweight = dweight.clone();
      found.dbias = dbias.clone();
      run(ctx, causal_conv1d_backward, found);
      if (threads == 1) first = found;
      const std::string name = concat(threads, " threads: ");
      expect_same_bits(found.dx, first.dx, name + "dx");
      expect_same_bits(found.dinitial_states, first.dinitial_states, name + "dinitial_states");
      expect_same_bits(found.dweight, first.dweight, name + "dweight");
      expect_same_bits(found.dbias, first.dbias, name + "dbias");
    }
  }
}

// What is asked for beside it changes no gradient.
TEST(CausalConv1dBackward, EachDestinationAlone) {
  Context ctx;
  Rng rng(8);
  const Dims shape{2, 21, 50};
  const Dims state_shape{2, 21, 3};
  for (const ConvPath path : {ConvPath::reference, fast_path()})
    for (const Activation activation : {Activation::none, Activation::silu}) {
      const CausalConv1dBackwardArgs args{.x = random_tensor(rng, shape),
                                          .weight = random_tensor(rng, {21, 4}),
                                          .initial_states = random_tensor(rng, state_shape),
                                          .activation = activation,
                                          .dout = random_tensor(rng, shape),
                                          .dfinal_states = random_tensor(rng, state_shape),
                                          .path = path};
      constexpr std::array<std::pair<Tensor CausalConv1dBackwardArgs::*, const char*>, 4> kDestinations{
          {{&CausalConv1dBackwardArgs::dx, "dx"},
           {&CausalConv1dBackwardArgs::dweight, "dweight"},
           {&CausalConv1dBackwardArgs::dbias, "dbias"},
           {&CausalConv1dBackwardArgs::dinitial_states, "dinitial_states"}}};
      CausalConv1dBackwardArgs all = args;
      all.dx = Tensor::zeros(shape);
      all.dweight = Tensor::zeros({21, 4});
      all.dbias = Tensor::zeros({21});
      all.dinitial_states = Tensor::zeros(state_shape);
      run(ctx, causal_conv1d_backward, all);
      for (const auto& [member, name] : kDestinations) {
        CausalConv1dBackwardArgs alone = args;
        alone.*member = Tensor::zeros((all.*member).shape());
        run(ctx, causal_conv1d_backward, alone);
        expect_same_bits(alone.*member, all.*member, name);
      }
      run(ctx, causal_conv1d_backward, args);  // nothing is wanted
    }
}

// Back-propagation through time: two halves, the state's gradient carried from the second to the first, are
// one pass.
TEST(CausalConv1dBackward, SplitWithGradientCarriedIsOnePass) {
  Context ctx;
  Rng rng(9);
  for (const std::int64_t kernel : {1, 2, 4, 6})
    for (const std::int64_t cut : {0, 1, 2, 10, 23}) {
      SCOPED_TRACE(concat("K ", kernel, " cut at ", cut));
      const Tensor x = random_tensor(rng, {2, 9, 23});
      const Tensor dout = random_tensor(rng, {2, 9, 23});
      const Tensor start = random_tensor(rng, {2, 9, kernel - 1});
      const Dims state_shape = start.shape();
      CausalConv1dBackwardArgs whole{.x = x,
                                     .weight = random_tensor(rng, {9, kernel}),
                                     .initial_states = start,
                                     .activation = Activation::silu,
                                     .dout = dout,
                                     .dfinal_states = random_tensor(rng, state_shape),
                                     .dx = Tensor::empty({2, 9, 23}),
                                     .dweight = Tensor::zeros({9, kernel}),
                                     .dinitial_states = Tensor::empty(state_shape)};
      run(ctx, causal_conv1d_backward, whole);

      const Tensor dx = Tensor::empty({2, 9, 23});
      const Tensor carried = whole.dfinal_states.clone();
      CausalConv1dBackwardArgs part = whole;
      part.dweight = Tensor::zeros({9, kernel});
      part.dfinal_states = part.dinitial_states = carried;
      part.initial_states = run(ctx, causal_conv1d,
                                {.x = x.slice(2, 0, cut),
                                 .weight = whole.weight,
                                 .initial_states = start,
                                 .return_final_states = true})
                                .final_states;
      part.x = x.slice(2, cut, 23);
      part.dout = dout.slice(2, cut, 23);
      part.dx = dx.slice(2, cut, 23);
      run(ctx, causal_conv1d_backward, part);
      part.initial_states = start;
      part.x = x.slice(2, 0, cut);
      part.dout = dout.slice(2, 0, cut);
      part.dx = dx.slice(2, 0, cut);
      run(ctx, causal_conv1d_backward, part);
      expect_close(dx, whole.dx, 2e-6, "dx");
      expect_close(carried, whole.dinitial_states, 2e-6, "dinitial_states");
      expect_close(part.dweight, whole.dweight, 4e-6, "dweight");
    }
}

TEST(CausalConv1dBackward, PaddingTokensHaveNoGradient) {
  Context ctx;
  Rng rng(10);
  const std::vector<std::int64_t> ids = {-1, 0, 0, -1, -1, 0, 0, -1};
  const std::vector<std::int64_t> real = {1, 2, 5, 6};
  const Tensor x = random_tensor(rng, {1, 5, 8});
  const Tensor dout = random_tensor(rng, {1, 5, 8});
  Tensor short_x = Tensor::empty({1, 5, 4});
  Tensor short_dout = Tensor::empty({1, 5, 4});
  for (std::size_t i = 0; i < real.size(); ++i) {
    short_x.select(2, static_cast<std::int64_t>(i)).copy_from(x.select(2, real[i]));
    short_dout.select(2, static_cast<std::int64_t>(i)).copy_from(dout.select(2, real[i]));
  }
  CausalConv1dBackwardArgs args{.x = x,
                                .weight = random_tensor(rng, {5, 4}),
                                .bias = random_tensor(rng, {5}),
                                .initial_states = random_tensor(rng, {1, 5, 3}),
                                .seq_idx = Tensor::from(ids, {1, 8}),
                                .activation = Activation::silu,
                                .dout = dout,
                                .dfinal_states = random_tensor(rng, {1, 5, 3}),
                                .dx = random_tensor(rng, {1, 5, 8}),
                                .dweight = Tensor::zeros({5, 4}),
                                .dinitial_states = Tensor::empty({1, 5, 3})};
  CausalConv1dBackwardArgs dense = args;
  dense.x = short_x;
  dense.dout = short_dout;
  dense.seq_idx = {};
  dense.dx = Tensor::empty({1, 5, 4});
  dense.dweight = Tensor::zeros({5, 4});
  dense.dinitial_states = Tensor::empty({1, 5, 3});
  run(ctx, causal_conv1d_backward, args);
  run(ctx, causal_conv1d_backward, dense);
  for (std::size_t i = 0; i < real.size(); ++i)
    expect_same_bits(args.dx.select(2, real[i]), dense.dx.select(2, static_cast<std::int64_t>(i)), "dx");
  for (const std::int64_t t : {0, 3, 4, 7})
    expect_same_bits(args.dx.select(2, t), Tensor::zeros({1, 5}), "dx of padding");
  expect_same_bits(args.dweight, dense.dweight, "dweight");
  expect_same_bits(args.dinitial_states, dense.dinitial_states, "dinitial_states");
}

TEST(CausalConv1dBackward, MessagesNameWhatWasFound) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 3, 8});
  const auto message = [&](CausalConv1dBackwardArgs args) {
    if (!args.x) args.x = x;
    if (!args.weight) args.weight = Tensor::zeros({3, 4});
    if (!args.dout) args.dout = Tensor::zeros({2, 3, 8});
    return message_of([&] { causal_conv1d_backward(ctx, args); });
  };
  EXPECT_EQ(message_of([&] { causal_conv1d_backward(ctx, {}); }), "[causal_conv1d_backward] x is missing");
  EXPECT_EQ(message_of([&] {
              causal_conv1d_backward(ctx, {.x = x, .weight = Tensor::zeros({3, 4})});
            }),
            "[causal_conv1d_backward] dout is missing");
  EXPECT_EQ(message({.weight = Tensor::zeros({4, 4})}),
            "[causal_conv1d_backward] weight has shape (4, 4), expected (3, K): one row for each channel");
  EXPECT_EQ(
      message({.initial_states = Tensor::zeros({2, 3, 4})}),
      "[causal_conv1d_backward] initial_states has shape (2, 3, 4), expected (2, 3, 3): the K - 1 inputs "
      "before each sequence");
  EXPECT_EQ(message({.seq_idx = Tensor::zeros({2, 7}, DType::i32)}),
            "[causal_conv1d_backward] seq_idx has shape (2, 7), expected (2, 8)");
  EXPECT_EQ(message({.dout = Tensor::zeros({2, 3, 7})}),
            "[causal_conv1d_backward] dout has shape (2, 3, 7), expected (2, 3, 8): that of x");
  EXPECT_EQ(
      message({.dfinal_states = Tensor::zeros({2, 3, 2})}),
      "[causal_conv1d_backward] dfinal_states has shape (2, 3, 2), expected (2, 3, 3): that of the final "
      "states");
  EXPECT_EQ(message({.dx = Tensor::zeros({2, 3, 8}, DType::f64)}),
            "[causal_conv1d_backward] dx has dtype f64 beside x of f32: f64 needs x in f64 too");
  EXPECT_EQ(message({.dweight = Tensor::zeros({3, 4}, DType::bf16)}),
            "[causal_conv1d_backward] dweight has dtype bf16, expected f32: it is added to");
  EXPECT_EQ(message({.dbias = Tensor::zeros({4})}),
            "[causal_conv1d_backward] dbias has shape (4,), expected (3,): one value for each channel");
  EXPECT_EQ(message({.dx = x}), "[causal_conv1d_backward] dx overlaps x");
  const Tensor longer = Tensor::zeros({2, 3, 9});
  EXPECT_EQ(message({.dout = longer.slice(2, 0, 8), .dx = longer.slice(2, 1, 9)}),
            "[causal_conv1d_backward] dx overlaps dout without being the same view");
  const Tensor states = Tensor::zeros({2, 3, 3});
  EXPECT_EQ(message({.initial_states = states, .dinitial_states = states}),
            "[causal_conv1d_backward] dinitial_states overlaps initial_states");
  EXPECT_EQ(message({.x = x.to(DType::f64), .path = ConvPath::simd}),
            "[causal_conv1d_backward] the path simd takes f32, bf16 or f16, x has dtype f64");
}

}  // namespace
}  // namespace krait
