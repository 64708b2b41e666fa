#include "krait/ops/projection.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/ops/linear.h"
#include "krait/ops/norm.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;

enum class Conv : std::uint8_t { none, plain, indexed };

struct Options {
  std::int64_t rows = 1;
  std::int64_t in = 64;
  std::int64_t out = 40;
  DType dtype = DType::f16;
  ProjectionNorm norm = ProjectionNorm::rms;
  bool residual = true;
  bool gate = false;
  bool norm_before_gate = false;
  bool bias = false;
  Conv conv = Conv::none;
  std::int64_t taps = 4;
  std::int64_t groups = 1;
  bool scatter = false;
};

std::string describe(const Options& o) {
  return concat(o.rows, " x ", o.in, " x ", o.out, " ", o.dtype, " norm ", static_cast<int>(o.norm),
                o.residual ? " residual" : "", o.gate ? o.norm_before_gate ? " gated after" : " gated" : "",
                o.bias ? " bias" : "", " conv ", static_cast<int>(o.conv), " taps ", o.taps, " groups ",
                o.groups, o.scatter ? " scattered" : "");
}

ProjectionArgs make_args(const Options& o) {
  Rng rng(static_cast<std::uint64_t>(o.rows * 1000 + o.in + o.out));
  const int layout = o.scatter ? kScattered : 0;
  ProjectionArgs args;
  args.x = random_tensor(rng, {o.rows, o.in}, o.dtype, -2, 2, layout);
  args.weight = random_tensor(rng, {o.out, o.in}, o.dtype, -0.5, 0.5, layout);
  if (o.bias) args.bias = random_tensor(rng, {o.out}, DType::f32, -1, 1);
  if (o.norm != ProjectionNorm::none) {
    args.input = {.norm = o.norm, .eps = 1e-5, .group_size = o.in / o.groups};
    args.input.weight = random_tensor(rng, {o.in}, DType::f32, 0.5, 1.5);
    if (o.norm == ProjectionNorm::layer) args.input.bias = random_tensor(rng, {o.in}, DType::f32, -1, 1);
    args.input.return_residual = !o.gate;
    if (o.residual && !o.gate)
      args.input.residual = random_tensor(rng, {o.rows, o.in}, DType::f32, -3, 3, layout);
    // A slice of wider rows, as in_proj's output has it.
    if (o.gate)
      args.input.z = random_tensor(rng, {o.rows, 3 * o.in}, o.dtype, -2, 2).slice(1, o.in, 2 * o.in);
    args.input.norm_before_gate = o.norm_before_gate;
  }
  if (o.conv != Conv::none) {
    const std::int64_t channels = o.out - 3;
    const std::int64_t states = o.conv == Conv::indexed ? o.rows + 2 : o.rows;
    args.conv.first = 2;
    args.conv.weight = random_tensor(rng, {channels, o.taps}, DType::f32, -1, 1);
    args.conv.bias = random_tensor(rng, {channels}, DType::f32, -1, 1);
    // Channels contiguous, as in a pool.
    args.conv.conv_state =
        random_tensor(rng, {states, o.taps - 1, channels}, DType::f32, -1, 1).transpose(1, 2);
    if (o.conv == Conv::indexed) {
      args.conv.conv_state_indices = Tensor::empty({o.rows}, DType::i64);
      for (std::int64_t i = 0; i < o.rows; ++i)
        args.conv.conv_state_indices.data<std::int64_t>()[i] = i == 1 ? -1 : o.rows + 1 - i;
    }
  }
  return args;
}

// Every element against what the three operators give in f32 on the CPU.
void expect_the_operators(const Options& o) {
  SCOPED_TRACE(describe(o));
  Context ctx;
  const ProjectionArgs args = make_args(o);
  ProjectionArgs wide = make_args(o);
  wide.x = wide.x.to(DType::f32);
  wide.weight = wide.weight.to(DType::f32);
  if (wide.input.z) wide.input.z = wide.input.z.to(DType::f32);
  const ProjectionResult want = projection(ctx, wide);
  const ProjectionResult found = run(ctx, projection, args);
  const double tolerance = 4 * rounding_of(o.dtype);
  expect_close(found.out, want.out, tolerance, tolerance, "out");
  expect_close(found.residual, want.residual, 1e-6, 1e-6, "residual");
  expect_close(found.convolved, want.convolved, tolerance, tolerance, "convolved");
  if (args.conv.conv_state)
    expect_close(args.conv.conv_state, wide.conv.conv_state, tolerance, tolerance, "conv_state");
  if (!on_gpu()) return;
  const ProjectionResult again = run(ctx, projection, make_args(o));
  expect_same_bits(again.out, found.out, "out again");
  if (found.residual) expect_same_bits(again.residual, found.residual, "residual again");
  if (found.convolved) expect_same_bits(again.convolved, found.convolved, "convolved again");
}

TEST(Projection, IsItsOperators) {
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32})
    for (const std::int64_t rows : {1, 3, 4, 5, 17})
      for (const auto& [in, out] :
           std::vector<std::pair<std::int64_t, std::int64_t>>{{64, 40}, {8, 5}, {768, 335}, {200, 1301}}) {
        if (rows > 5 && in > 64) continue;
        expect_the_operators({.rows = rows, .in = in, .out = out, .dtype = dtype});
        expect_the_operators({.rows = rows, .in = in, .out = out, .dtype = dtype, .conv = Conv::plain});
        expect_the_operators({.rows = rows, .in = in, .out = out, .dtype = dtype, .gate = true});
      }
}

TEST(Projection, Options) {
  for (const std::int64_t rows : {1, 3}) {
    expect_the_operators({.rows = rows, .in = 5120, .out = 640, .gate = true});
    expect_the_operators({.rows = rows, .in = 8192, .out = 300, .gate = true, .norm_before_gate = true});
    expect_the_operators({.rows = rows, .in = 8200, .out = 300});
    expect_the_operators({.rows = rows, .in = 1536, .out = 768, .gate = true});
    expect_the_operators({.rows = rows, .in = 2560, .out = 640, .conv = Conv::plain});
    expect_the_operators({.rows = rows, .norm = ProjectionNorm::none, .residual = false});
    expect_the_operators({.rows = rows, .norm = ProjectionNorm::layer, .bias = true, .conv = Conv::indexed});
    expect_the_operators({.rows = rows, .in = 784, .out = 1111, .norm = ProjectionNorm::layer});
    expect_the_operators({.rows = rows, .residual = false, .conv = Conv::indexed});
    expect_the_operators({.rows = rows, .conv = Conv::plain, .taps = 3});
    expect_the_operators({.rows = rows, .conv = Conv::indexed, .scatter = true});
    expect_the_operators({.rows = rows, .in = 63, .out = 17, .conv = Conv::plain});
    expect_the_operators({.rows = rows, .gate = true, .groups = 4});
  }
  expect_the_operators({.in = 768, .out = 50280, .bias = true});
}

// Kernels that start before those in front of them have ended give the same bits: a chain of blocks, each on
// top of the one before it.
TEST(Projection, OverlapChangesNoBit) {
  if (!on_gpu()) GTEST_SKIP() << "needs a GPU";
  Context& ctx = gpu_context();
  constexpr std::int64_t kWidth = 768;
  Rng rng(5);
  const auto device = [&](const Dims& shape, DType dtype, double size) {
    return ctx.to_device(random_tensor(rng, shape, dtype, -size, size));
  };
  const Tensor into = device({2 * kWidth, kWidth}, DType::f16, 0.05);
  const Tensor from = device({kWidth, 2 * kWidth}, DType::f16, 0.05);
  const Tensor norm1 = device({kWidth}, DType::f32, 1);
  const Tensor norm2 = device({2 * kWidth}, DType::f32, 1);
  const Tensor taps = device({2 * kWidth, 4}, DType::f32, 1);
  const Tensor windows = device({1, 2 * kWidth, 3}, DType::f32, 1);
  const Tensor x = device({1, kWidth}, DType::f16, 1);
  const auto chain = [&] {
    const Tensor state = ctx.clone(windows);
    Tensor hidden = ctx.clone(x);
    Tensor residual;
    for (int layer = 0; layer < 20; ++layer) {
      const ProjectionResult in = projection(ctx, {.x = hidden,
                                                   .input = {.norm = ProjectionNorm::rms,
                                                             .weight = norm1,
                                                             .residual = residual,
                                                             .return_residual = true},
                                                   .weight = into,
                                                   .conv = {.conv_state = state, .weight = taps}});
      residual = in.residual;
      hidden = projection(ctx, {.x = in.convolved,
                                .input = {.norm = ProjectionNorm::rms, .weight = norm2, .z = in.out},
                                .weight = from})
                   .out;
    }
    return std::vector<Tensor>{ctx.to_host(hidden), ctx.to_host(residual), ctx.to_host(state)};
  };
  const std::vector<Tensor> want = chain();
  for (int i = 0; i < 20; ++i) {
    const OverlappingKernels overlap(ctx);
    const std::vector<Tensor> found = chain();
    for (std::size_t t = 0; t < want.size(); ++t) expect_same_bits(found[t], want[t], concat("tensor ", t));
  }
}

TEST(Projection, NamesWhatDoesNotFit) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 8});
  const Tensor weight = Tensor::zeros({4, 8});
  EXPECT_EQ(message_of([&] {
              (void)projection(ctx, {.x = x, .weight = Tensor::zeros({4, 7})});
            }),
            "[projection] weight has shape (4, 7), expected (out, 8)");
  EXPECT_EQ(message_of([&] {
              (void)projection(ctx, {.x = x, .input = {.weight = Tensor::zeros({8})}, .weight = weight});
            }),
            "[projection] a norm's weight, bias, residual or gate is given, but no norm");
  EXPECT_EQ(
      message_of([&] {
        (void)projection(
            ctx,
            {.x = x,
             .weight = weight,
             .conv = {.conv_state = Tensor::zeros({2, 3, 3}), .weight = Tensor::zeros({3, 4}), .first = 2}});
      }),
      "[projection] the convolution begins at column 2 and has 3 channels, of 4 columns");
}

}  // namespace
}  // namespace krait
