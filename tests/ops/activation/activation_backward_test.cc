#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <string>

#include "core/on_device.h"
#include "krait/ops/activation.h"
#include "ops/finite_difference.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;

constexpr std::array kKinds{GeluKind::exact, GeluKind::tanh};

// The vectorised path: on the CPU, or the device's own.
ActivationPath fast() { return testing::on_gpu() ? ActivationPath::automatic : ActivationPath::simd; }

const char* name_of(GeluKind kind) { return kind == GeluKind::exact ? "exact" : "tanh"; }

TEST(ActivationBackward, ReferenceIsTheGradient) {
  Context ctx;
  Rng rng(1);
  const Dims shape{3, 7};
  const auto tensor = [&](double range) { return random_tensor(rng, shape, DType::f64, -range, range); };
  for (const double range : {1.0, 6.0}) {
    SCOPED_TRACE(range);
    const Tensor x = tensor(range);
    const Tensor gate = tensor(range);
    const Tensor dout = tensor(1.0);
    const Tensor dx = Tensor::empty(shape, DType::f64);
    const Tensor dgate = Tensor::empty(shape, DType::f64);
    testing::run(ctx, gated_silu_backward, {.x = x, .gate = gate, .dout = dout, .dx = dx, .dgate = dgate});
    EXPECT_EQ(ctx.backend(), "gated_silu_backward: reference");
    const auto gated_loss = [&] {
      return test::weighted_sum(testing::run(ctx, gated_silu, {.x = x, .gate = gate}), dout);
    };
    test::expect_gradient(gated_loss, x, dx, "gated_silu, dx");
    test::expect_gradient(gated_loss, gate, dgate, "gated_silu, dgate");
    for (const GeluKind kind : kKinds) {
      testing::run(ctx, gelu_backward, {.x = x, .dout = dout, .dx = dx, .kind = kind});
      EXPECT_EQ(ctx.backend(), "gelu_backward: reference");
      test::expect_gradient(
          [&] { return test::weighted_sum(testing::run(ctx, gelu, {.x = x, .kind = kind}), dout); }, x, dx,
          name_of(kind));
    }
  }
}

// Any mixture of dtypes and layouts; each destination may be absent.
TEST(ActivationBackward, SimdMatchesTheReference) {
  on_each_target([] {
    Context ctx(ContextOptions{.threads = 2});
    Rng rng(2);
    for (int trial = 0; trial < 100; ++trial)
      for (const Dims& shape : {Dims{}, Dims{7}, Dims{3, 33}, Dims{2, 3, 700}, Dims{0, 4}, Dims{4, 0}}) {
        const bool plain = coin(rng, 0.3);  // contiguous f32: the rows that need no buffers
        const auto tensor = [&] {
          return random_tensor(rng, shape, plain ? DType::f32 : random_dtype(rng), -9.0, 9.0,
                               plain ? 0 : static_cast<int>(pick(rng, 0, 3)));
        };
        GatedSiluBackwardArgs args{.x = tensor(), .gate = tensor(), .dout = tensor(), .path = fast()};
        if (coin(rng, 0.8)) args.dx = tensor();
        if (coin(rng, 0.8)) args.dgate = tensor();
        SCOPED_TRACE(concat("trial ", trial, " ", shape, " x ", args.x.dtype(), " strides ", args.x.strides(),
                            " gate ", args.gate.dtype(), " dout ", args.dout.dtype()));
        const Tensor dx = Tensor::zeros(shape, DType::f64);
        const Tensor dgate = Tensor::zeros(shape, DType::f64);
        testing::run(ctx, gated_silu_backward,
                     {.x = to_f64(args.x),
                      .gate = to_f64(args.gate),
                      .dout = to_f64(args.dout),
                      .dx = dx,
                      .dgate = dgate});
        testing::run(ctx, gated_silu_backward, args);
        if (args.dx) expect_close(args.dx, dx, 2e-6 + rounding_of(args.dx.dtype()), "dx");
        if (args.dgate) expect_close(args.dgate, dgate, 2e-6 + rounding_of(args.dgate.dtype()), "dgate");
        for (const GeluKind kind : kKinds) {
          const Tensor found = tensor();
          testing::run(ctx, gelu_backward,
                       {.x = args.x, .dout = args.dout, .dx = found, .kind = kind, .path = fast()});
          if (!on_gpu()) {
            EXPECT_EQ(ctx.backend(), "gelu_backward: simd");
          }
          testing::run(ctx, gelu_backward,
                       {.x = to_f64(args.x), .dout = to_f64(args.dout), .dx = dx, .kind = kind});
          expect_close(found, dx, 4e-6 + rounding_of(found.dtype()), name_of(kind));
        }
        if (::testing::Test::HasFailure()) return;
      }
  });
}

TEST(ActivationBackward, ReferenceTakesEveryDtype) {
  Context ctx;
  Rng rng(3);
  for (const DType dtype : kDtypes) {
    SCOPED_TRACE(concat(dtype));
    const auto tensor = [&] { return random_tensor(rng, {4, 9}, dtype, -3.0, 3.0, 3); };
    const GatedSiluBackwardArgs args{.x = tensor(),
                                     .gate = tensor(),
                                     .dout = tensor(),
                                     .dx = tensor(),
                                     .dgate = tensor(),
                                     .path = ActivationPath::reference};
    const Tensor dx = Tensor::zeros({4, 9}, DType::f64);
    const Tensor dgate = Tensor::zeros({4, 9}, DType::f64);
    testing::run(ctx, gated_silu_backward,
                 {.x = to_f64(args.x),
                  .gate = to_f64(args.gate),
                  .dout = to_f64(args.dout),
                  .dx = dx,
                  .dgate = dgate});
    testing::run(ctx, gated_silu_backward, args);
    expect_close(args.dx, dx, rounding_of(dtype), "dx");
    expect_close(args.dgate, dgate, rounding_of(dtype), "dgate");
  }
}

TEST(ActivationBackward, InPlace) {
  Rng rng(4);
  Context ctx;
  for (const ActivationPath path : {ActivationPath::reference, fast()})
    for (const DType dtype : {DType::f32, DType::bf16})
      for (int layout = 0; layout < 4; ++layout) {
        SCOPED_TRACE(concat(dtype, " layout ", layout));
        const Dims shape{3, 2, 601};
        const auto tensor = [&] { return random_tensor(rng, shape, dtype, -2.0, 2.0, layout); };
        const GatedSiluBackwardArgs args{.x = tensor(),
                                         .gate = tensor(),
                                         .dout = tensor(),
                                         .dx = Tensor::empty(shape, dtype),
                                         .dgate = Tensor::empty(shape, dtype),
                                         .path = path};
        testing::run(ctx, gated_silu_backward, args);
        for (int dx = 0; dx < 3; ++dx)
          for (int dgate = 0; dgate < 3; ++dgate) {
            if (dx == dgate) continue;
            SCOPED_TRACE(concat("dx is input ", dx, ", dgate is input ", dgate));
            const std::array inputs{laid_out(args.x.clone(), layout), laid_out(args.gate.clone(), layout),
                                    laid_out(args.dout.clone(), layout)};
            testing::run(ctx, gated_silu_backward,
                         {.x = inputs[0],
                          .gate = inputs[1],
                          .dout = inputs[2],
                          .dx = inputs[static_cast<std::size_t>(dx)],
                          .dgate = inputs[static_cast<std::size_t>(dgate)],
                          .path = path});
            expect_same_bits(inputs[static_cast<std::size_t>(dx)], args.dx, "dx");
            expect_same_bits(inputs[static_cast<std::size_t>(dgate)], args.dgate, "dgate");
          }
        for (const GeluKind kind : kKinds) {
          testing::run(ctx, gelu_backward,
                       {.x = args.x, .dout = args.dout, .dx = args.dx, .kind = kind, .path = path});
          const Tensor x = laid_out(args.x.clone(), layout);
          testing::run(ctx, gelu_backward, {.x = x, .dout = args.dout, .dx = x, .kind = kind, .path = path});
          expect_same_bits(x, args.dx, "dx is x");
          const Tensor dout = laid_out(args.dout.clone(), layout);
          testing::run(ctx, gelu_backward,
                       {.x = args.x, .dout = dout, .dx = dout, .kind = kind, .path = path});
          expect_same_bits(dout, args.dx, "dx is dout");
        }
      }
}

// Rows of whole vectors, in one memory and in rows of a wider one.
TEST(ActivationBackward, RowsOfModels) {
  Rng rng(9);
  Context ctx;
  for (const DType dtype : kDtypes)
    for (const std::int64_t gap : {0, 64}) {
      SCOPED_TRACE(concat(dtype, " gap ", gap));
      const auto tensor = [&] {
        return random_tensor(rng, {33, 1536 + gap}, dtype, -6.0, 6.0).slice(1, gap / 2, 1536 + gap / 2);
      };
      const GatedSiluBackwardArgs args{.x = tensor(),
                                       .gate = tensor(),
                                       .dout = tensor(),
                                       .dx = tensor(),
                                       .dgate = tensor(),
                                       .path = fast()};
      const Tensor dx = Tensor::zeros({33, 1536}, DType::f64);
      const Tensor dgate = Tensor::zeros({33, 1536}, DType::f64);
      gated_silu_backward(ctx, {.x = to_f64(args.x),
                                .gate = to_f64(args.gate),
                                .dout = to_f64(args.dout),
                                .dx = dx,
                                .dgate = dgate});
      testing::run(ctx, gated_silu_backward, args);
      expect_close(args.dx, dx, 2e-6 + rounding_of(dtype), "dx");
      expect_close(args.dgate, dgate, 2e-6 + rounding_of(dtype), "dgate");
    }
}

// The gated MLP keeps x and gate side by side in one matrix, and their gradients likewise.
TEST(ActivationBackward, HalvesOfOneMatrix) {
  Rng rng(5);
  Context ctx;
  const Tensor both = random_tensor(rng, {2, 5, 66});
  const Tensor dboth = Tensor::empty({2, 5, 66});
  const Tensor dout = random_tensor(rng, {2, 5, 33});
  const Tensor x = both.slice(2, 0, 33);
  const Tensor gate = both.slice(2, 33, 66);
  testing::run(
      ctx, gated_silu_backward,
      {.x = x, .gate = gate, .dout = dout, .dx = dboth.slice(2, 0, 33), .dgate = dboth.slice(2, 33, 66)});
  testing::run(ctx, gated_silu_backward, {.x = x, .gate = gate, .dout = dout, .dx = x, .dgate = gate});
  expect_same_bits(both, dboth, "in place");
}

TEST(ActivationBackward, ExtremesStayFinite) {
  Context ctx;
  const Tensor g = Tensor::from<float>({-200.0F, 200.0F, -1e30F, 1e30F});
  const Tensor ones = Tensor::from<float>({1.0F, 1.0F, 1.0F, 1.0F});
  const Tensor dx = Tensor::empty({4});
  const Tensor dgate = Tensor::empty({4});
  for (const ActivationPath path : {ActivationPath::reference, fast()}) {
    testing::run(ctx, gated_silu_backward,
                 {.x = ones, .gate = g, .dout = ones, .dx = dx, .dgate = dgate, .path = path});
    expect_close(dx, Tensor::from<float>({0.0F, 200.0F, 0.0F, 1e30F}), 1e-6, "dx");
    expect_close(dgate, Tensor::from<float>({0.0F, 1.0F, 0.0F, 1.0F}), 1e-6, "dgate");
    for (const GeluKind kind : kKinds) {
      testing::run(ctx, gelu_backward, {.x = g, .dout = ones, .dx = dx, .kind = kind, .path = path});
      expect_close(dx, Tensor::from<float>({0.0F, 1.0F, 0.0F, 1.0F}), 1e-6, name_of(kind));
    }
  }
}

TEST(ActivationBackward, NanStaysNan) {
  Context ctx;
  const Tensor x = Tensor::from<float>({1.0F, NAN, 1.0F});
  const Tensor dout = Tensor::from<float>({1.0F, 1.0F, 1.0F});
  const Tensor dx = Tensor::empty({3});
  for (const ActivationPath path : {ActivationPath::reference, fast()})
    for (const GeluKind kind : kKinds) {
      testing::run(ctx, gelu_backward, {.x = x, .dout = dout, .dx = dx, .kind = kind, .path = path});
      for (int i = 0; i < 3; ++i) EXPECT_EQ(std::isnan(dx.data<float>()[i]), i == 1) << name_of(kind) << i;
    }
}

TEST(ActivationBackward, ThreadsDoNotChangeBits) {
  Rng rng(6);
  const Dims shape{300, 129};
  const Tensor x = random_tensor(rng, shape);
  const Tensor gate = random_tensor(rng, shape);
  const Tensor dout = random_tensor(rng, shape, DType::bf16);
  std::array<Tensor, 3> first;
  for (const int threads : {1, 2, 3}) {
    Context ctx(ContextOptions{.threads = threads});
    const std::array found{Tensor::empty(shape), Tensor::empty(shape), Tensor::empty(shape)};
    testing::run(ctx, gated_silu_backward,
                 {.x = x, .gate = gate, .dout = dout, .dx = found[0], .dgate = found[1]});
    testing::run(ctx, gelu_backward, {.x = x, .dout = dout, .dx = found[2]});
    if (threads == 1) first = found;
    for (std::size_t i = 0; i < 3; ++i)
      expect_same_bits(found[i], first[i], concat(threads, " threads, output ", i));
  }
}

TEST(ActivationBackward, NamesWhatIsWrong) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 3});
  const auto gated = [&](GatedSiluBackwardArgs args) {
    if (!args.x) args.x = x;
    if (!args.gate) args.gate = Tensor::zeros({2, 3});
    if (!args.dout) args.dout = Tensor::zeros({2, 3});
    return message_of([&] { gated_silu_backward(ctx, args); });
  };
  EXPECT_EQ(message_of([&] { gated_silu_backward(ctx, {}); }), "[gated_silu_backward] x is missing");
  EXPECT_EQ(message_of([&] { gated_silu_backward(ctx, {.x = x}); }), "[gated_silu_backward] gate is missing");
  EXPECT_EQ(gated({.gate = Tensor::zeros({2, 4})}),
            "[gated_silu_backward] gate has shape (2, 4), expected (2, 3)");
  EXPECT_EQ(gated({.dout = Tensor::zeros({3})}),
            "[gated_silu_backward] dout has shape (3,), expected (2, 3)");
  EXPECT_EQ(gated({.dx = Tensor::zeros({2, 3}, DType::i32)}),
            "[gated_silu_backward] dx has dtype i32, expected f32, f64, bf16 or f16");
  EXPECT_EQ(gated({.dx = x, .dgate = x}), "[gated_silu_backward] dx overlaps dgate");
  const Tensor wider = Tensor::zeros({2, 6});
  EXPECT_EQ(gated({.x = wider.slice(1, 0, 3), .dgate = wider.slice(1, 2, 5)}),
            "[gated_silu_backward] dgate overlaps x without being the same view");
  EXPECT_EQ(gated({.dgate = Tensor::zeros({2, 3}, DType::f64), .path = ActivationPath::simd}),
            "[gated_silu_backward] the simd path has no f64, expected f32, bf16 or f16");
  EXPECT_EQ(message_of([&] { gelu_backward(ctx, {.x = x, .dout = x}); }), "[gelu_backward] dx is missing");
  EXPECT_EQ(message_of([&] { gelu_backward(ctx, {.x = x, .dx = x}); }), "[gelu_backward] dout is missing");
  EXPECT_EQ(message_of([&] { gelu_backward(ctx, {.x = x, .dout = x, .dx = Tensor::zeros({2})}); }),
            "[gelu_backward] dx has shape (2,), expected (2, 3)");
}

}  // namespace
}  // namespace krait
