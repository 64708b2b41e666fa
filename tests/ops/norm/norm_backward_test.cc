#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "core/on_device.h"
#include "krait/ops/norm.h"
#include "ops/finite_difference.h"
#include "ops/norm/norm_cases.h"

namespace krait {
namespace {

using namespace testing;

// The vectorised path: on the CPU, or the device's own.
NormPath fast() { return testing::on_gpu() ? NormPath::automatic : NormPath::simd; }

void run(Context& ctx, NormKind kind, const NormBackwardArgs& args) {
  void (*const rms)(Context&, const NormBackwardArgs&) = [](Context& c, const NormBackwardArgs& a) {
    norm_backward(c, NormKind::rms, a);
  };
  void (*const layer)(Context&, const NormBackwardArgs&) = [](Context& c, const NormBackwardArgs& a) {
    norm_backward(c, NormKind::layer, a);
  };
  testing::run(ctx, kind == NormKind::rms ? rms : layer, args);
}

std::string name_of(NormKind kind, const NormBackwardArgs& args) {
  return concat(kind == NormKind::rms ? "rms " : "layer ", args.x.shape(), " groups of ", args.group_size,
                " x ", args.x.dtype(), " dout ", args.dout.dtype(), args.weight ? " weight" : "",
                args.bias ? " bias" : "",
                args.z ? (args.norm_before_gate ? " norm before gate" : " gate before norm") : "",
                args.dresidual ? " dresidual" : "");
}

struct Gradients {
  Tensor dx;
  Tensor dz;
  Tensor dweight;
  Tensor dbias;
};

// The f64 reference of the same problem; sums start from those of `args`.
Gradients expected_of(Context& ctx, NormKind kind, const NormBackwardArgs& args) {
  const auto wide = [](const Tensor& t) { return t ? t.to(DType::f64).clone() : Tensor(); };
  NormBackwardArgs exact = args;
  for (Tensor* t : {&exact.x, &exact.weight, &exact.bias, &exact.z, &exact.dout, &exact.dresidual,
                    &exact.dweight, &exact.dbias})
    *t = wide(*t);
  exact.dx = Tensor::zeros(args.x.shape(), DType::f64);
  if (args.z) exact.dz = Tensor::zeros(args.x.shape(), DType::f64);
  exact.path = NormPath::reference;
  norm_backward(ctx, kind, exact);
  return {exact.dx, exact.dz, exact.dweight, exact.dbias};
}

TEST(NormBackward, ReferenceIsTheGradient) {
  Context ctx;
  Rng rng(1);
  const Dims shape{2, 2, 6};
  enum class Gate { none, first, last };
  for (const NormKind kind : kKinds)
    for (const Gate gate : {Gate::none, Gate::first, Gate::last})
      for (const std::int64_t group_size : {0, 2, 3})
        for (const bool affine : {false, true})
          for (const bool carried : {false, true}) {
            const auto tensor = [&](const Dims& size) {
              return random_tensor(rng, size, DType::f64, -1.5, 2.0);
            };
            NormArgs forward{.x = tensor(shape),
                             .residual = carried ? tensor(shape) : Tensor(),
                             .z = gate == Gate::none ? Tensor() : tensor(shape),
                             .eps = 0.1,
                             .group_size = group_size,
                             .norm_before_gate = gate != Gate::first,
                             .prenorm = true};
            if (affine) {
              forward.weight = tensor({6});
              forward.bias = tensor({6});
            }
            NormBackwardArgs args{.x = norm(ctx, kind, forward).residual,
                                  .weight = forward.weight,
                                  .bias = forward.bias,
                                  .z = forward.z,
                                  .eps = forward.eps,
                                  .group_size = group_size,
                                  .norm_before_gate = forward.norm_before_gate,
                                  .dout = tensor(shape),
                                  .dresidual = carried ? tensor(shape) : Tensor(),
                                  .dx = Tensor::empty(shape, DType::f64),
                                  .dweight = tensor({6}),
                                  .dbias = tensor({6})};
            if (forward.z) args.dz = Tensor::empty(shape, DType::f64);
            SCOPED_TRACE(name_of(kind, args));
            const Tensor dweight_before = args.dweight.clone();
            const Tensor dbias_before = args.dbias.clone();
            run(ctx, kind, args);
            EXPECT_NE(ctx.backend().find("norm_backward: reference"), std::string::npos) << ctx.backend();

            // Where the forward has no weight or bias, their gradients are those at 1 and 0.
            NormArgs varied = forward;
            if (!affine) {
              varied.weight = Tensor::empty({6}, DType::f64);
              varied.weight.fill(1.0);
              varied.bias = Tensor::zeros({6}, DType::f64);
            }
            const auto loss = [&] {
              const NormResult result = norm(ctx, kind, varied);
              return test::weighted_sum(result.out, args.dout) +
                     (carried ? test::weighted_sum(result.residual, args.dresidual) : 0.0) +
                     test::weighted_sum(varied.weight, dweight_before) +
                     test::weighted_sum(varied.bias, dbias_before);
            };
            test::expect_gradient(loss, varied.x, args.dx, "dx");
            if (carried) test::expect_gradient(loss, varied.residual, args.dx, "dx, by the residual");
            if (varied.z) test::expect_gradient(loss, varied.z, args.dz, "dz");
            test::expect_gradient(loss, varied.weight, args.dweight, "dweight");
            test::expect_gradient(loss, varied.bias, args.dbias, "dbias");
            if (HasFailure()) return;
          }
}

NormBackwardArgs random_case(Rng& rng) {
  const auto layout = [&] { return static_cast<int>(pick(rng, 0, 3)); };
  const NormSizes sizes = random_sizes(rng, 80);
  const auto tensor = [&] { return random_tensor(rng, sizes.shape, random_dtype(rng), -2.0, 3.0, layout()); };
  const auto vector = [&](DType type) {
    return random_tensor(rng, {sizes.channels}, type, 0.5, 2.0, layout());
  };
  NormBackwardArgs args{.x = tensor(), .dout = tensor()};
  if (coin(rng, 0.7)) args.weight = vector(random_dtype(rng));
  if (coin(rng)) args.bias = vector(random_dtype(rng));
  if (coin(rng)) args.z = tensor();
  args.eps = 1e-2;
  args.group_size = sizes.group_size;
  args.norm_before_gate = coin(rng);
  if (coin(rng)) args.dresidual = tensor();
  if (coin(rng, 0.8)) args.dx = tensor();
  if (args.z && coin(rng, 0.8)) args.dz = tensor();
  if (coin(rng, 0.8)) args.dweight = vector(DType::f32);
  if (coin(rng, 0.8)) args.dbias = vector(DType::f32);
  args.path = fast();
  return args;
}

// Random combinations of everything, on each instruction set, against f64.
TEST(NormBackward, SimdMatchesTheReference) {
  on_each_target([] {
    Rng rng(2);
    Context ctx(ContextOptions{.threads = 2});
    for (int trial = 0; trial < 200; ++trial) {
      const NormBackwardArgs args = random_case(rng);
      for (const NormKind kind : kKinds) {
        SCOPED_TRACE(concat("trial ", trial, ": ", name_of(kind, args)));
        const Gradients expected = expected_of(ctx, kind, args);
        run(ctx, kind, args);
        if (!testing::on_gpu()) {
          EXPECT_NE(ctx.backend().find("norm_backward: simd"), std::string::npos) << ctx.backend();
        }
        constexpr double kTolerance = 1e-5;
        if (args.dx) expect_close(args.dx, expected.dx, kTolerance + rounding_of(args.dx.dtype()), "dx");
        if (args.dz) expect_close(args.dz, expected.dz, kTolerance + rounding_of(args.dz.dtype()), "dz");
        if (args.dweight) expect_close(args.dweight, expected.dweight, kTolerance, "dweight");
        if (args.dbias) expect_close(args.dbias, expected.dbias, kTolerance, "dbias");
        if (::testing::Test::HasFailure()) return;
      }
    }
  });
}

TEST(NormBackward, ReferenceTakesEveryDtype) {
  Rng rng(3);
  Context ctx;
  for (int trial = 0; trial < 40; ++trial) {
    NormBackwardArgs args = random_case(rng);
    args.path = NormPath::reference;
    SCOPED_TRACE(concat("trial ", trial, ": ", name_of(NormKind::layer, args)));
    const Gradients expected = expected_of(ctx, NormKind::layer, args);
    run(ctx, NormKind::layer, args);
    if (args.dx) expect_close(args.dx, expected.dx, rounding_of(args.dx.dtype()), "dx");
    if (args.dz) expect_close(args.dz, expected.dz, rounding_of(args.dz.dtype()), "dz");
    if (args.dweight) expect_close(args.dweight, expected.dweight, 1e-6, "dweight");
    if (args.dbias) expect_close(args.dbias, expected.dbias, 1e-6, "dbias");
  }
}

TEST(NormBackward, InPlace) {
  Rng rng(4);
  Context ctx;
  for (const NormPath path : {NormPath::reference, fast()})
    for (const bool norm_before_gate : {false, true})
      for (int layout = 0; layout < 4; ++layout) {
        SCOPED_TRACE(concat("layout ", layout, " norm_before_gate ", norm_before_gate));
        const auto tensor = [&] { return random_tensor(rng, {4, 3, 37}, DType::f32, -1.0, 1.0, layout); };
        NormBackwardArgs args{.x = tensor(),
                              .z = tensor(),
                              .norm_before_gate = norm_before_gate,
                              .dout = tensor(),
                              .dresidual = tensor(),
                              .dx = Tensor::empty({4, 3, 37}),
                              .dz = Tensor::empty({4, 3, 37}),
                              .path = path};
        run(ctx, NormKind::rms, args);
        const Tensor dx = args.dx;
        const Tensor dz = args.dz;
        const auto place = [&](bool dx_is_dout, bool dz_is_z) {
          NormBackwardArgs placed = args;
          placed.z = laid_out(args.z.clone(), layout);
          placed.dout = laid_out(args.dout.clone(), layout);
          placed.dresidual = laid_out(args.dresidual.clone(), layout);
          placed.dx = dx_is_dout ? placed.dout : placed.dresidual;
          placed.dz = dz_is_z ? placed.z : placed.dout;
          run(ctx, NormKind::rms, placed);
          expect_same_bits(placed.dx, dx, "dx");
          expect_same_bits(placed.dz, dz, "dz");
        };
        place(true, true);
        place(false, true);
        place(false, false);
      }
}

// What is asked for beside it changes no gradient.
TEST(NormBackward, EachDestinationAlone) {
  Rng rng(5);
  Context ctx;
  for (const NormPath path : {NormPath::reference, fast()})
    for (const bool norm_before_gate : {false, true}) {
      SCOPED_TRACE(concat("norm_before_gate ", norm_before_gate));
      const Dims shape{70, 21};
      NormBackwardArgs args{.x = random_tensor(rng, shape),
                            .weight = random_tensor(rng, {21}),
                            .bias = random_tensor(rng, {21}),
                            .z = random_tensor(rng, shape),
                            .norm_before_gate = norm_before_gate,
                            .dout = random_tensor(rng, shape),
                            .path = path};
      constexpr std::array<std::pair<Tensor NormBackwardArgs::*, const char*>, 4> kDestinations{
          {{&NormBackwardArgs::dx, "dx"},
           {&NormBackwardArgs::dz, "dz"},
           {&NormBackwardArgs::dweight, "dweight"},
           {&NormBackwardArgs::dbias, "dbias"}}};
      NormBackwardArgs all = args;
      all.dx = Tensor::zeros(shape);
      all.dz = Tensor::zeros(shape);
      all.dweight = Tensor::zeros({21});
      all.dbias = Tensor::zeros({21});
      run(ctx, NormKind::layer, all);
      for (const auto& [member, name] : kDestinations) {
        NormBackwardArgs alone = args;
        alone.*member = Tensor::zeros((all.*member).shape());
        run(ctx, NormKind::layer, alone);
        expect_same_bits(alone.*member, all.*member, name);
      }
      run(ctx, NormKind::layer, args);  // nothing is wanted
    }
}

TEST(NormBackward, EmptyShapes) {
  Context ctx;
  for (const NormPath path : {NormPath::reference, fast()})
    for (const NormKind kind : kKinds)
      for (const Dims& shape : {Dims{0}, Dims{0, 5}, Dims{3, 0}, Dims{2, 0, 4}}) {
        SCOPED_TRACE(concat(shape));
        const Tensor dweight = Tensor::empty({shape.back()});
        dweight.fill(3.0);
        run(ctx, kind,
            {.x = Tensor::zeros(shape),
             .dout = Tensor::zeros(shape),
             .dx = Tensor::zeros(shape),
             .dweight = dweight,
             .dbias = Tensor::zeros({shape.back()}),
             .path = path});
        for (const float value : dweight.span<float>()) EXPECT_EQ(value, 3.0F);
      }
}

TEST(NormBackward, LargeMean) {
  Context ctx;
  Rng rng(6);
  const Tensor x = random_tensor(rng, {5, 300}, DType::f32, 4095.0, 4097.0);
  NormBackwardArgs args{.x = x,
                        .eps = 1e-5,
                        .dout = random_tensor(rng, {5, 300}),
                        .dx = Tensor::empty({5, 300}),
                        .path = fast()};
  const Gradients expected = expected_of(ctx, NormKind::layer, args);
  run(ctx, NormKind::layer, args);
  // The mean itself is rounded to f32: 2^-12 beside 4096.
  expect_close(args.dx, expected.dx, 1e-3, "dx");
}

TEST(NormBackward, NanStaysInItsRow) {
  Context ctx;
  for (const NormPath path : {NormPath::reference, fast()}) {
    const Tensor x = Tensor::zeros({3, 21});
    const Tensor dout = Tensor::zeros({3, 21});
    const Tensor dx = Tensor::zeros({3, 21});
    x.fill(1.0);
    dout.fill(2.0);
    dout.data<float>()[21 + 20] = NAN;
    run(ctx, NormKind::rms, {.x = x, .dout = dout, .dx = dx, .path = path});
    for (std::int64_t i = 0; i < 63; ++i) EXPECT_EQ(std::isnan(dx.data<float>()[i]), i / 21 == 1) << i;
  }
}

TEST(NormBackward, ThreadsDoNotChangeBits) {
  Rng rng(7);
  // The last has more rows than there are blocks of the smallest size.
  for (const Dims& shape : {Dims{203, 1100}, Dims{31, 5}, Dims{9001, 9}}) {
    SCOPED_TRACE(concat(shape));
    const Tensor x = random_tensor(rng, shape);
    const Tensor z = random_tensor(rng, shape, DType::bf16);
    const Tensor dout = random_tensor(rng, shape);
    const Tensor start = random_tensor(rng, {shape.back()});
    Gradients first;
    for (const int threads : {1, 2, 3, 7}) {
      Context ctx(ContextOptions{.threads = threads});
      const Gradients found{Tensor::empty(shape), Tensor::empty(shape), start.clone(), start.clone()};
      run(ctx, NormKind::layer,
          {.x = x,
           .z = z,
           .norm_before_gate = false,
           .dout = dout,
           .dx = found.dx,
           .dz = found.dz,
           .dweight = found.dweight,
           .dbias = found.dbias});
      if (threads == 1) first = found;
      const std::string name = concat(threads, " threads: ");
      expect_same_bits(found.dx, first.dx, name + "dx");
      expect_same_bits(found.dz, first.dz, name + "dz");
      expect_same_bits(found.dweight, first.dweight, name + "dweight");
      expect_same_bits(found.dbias, first.dbias, name + "dbias");
    }
  }
}

// Shapes of models, in the layouts that they have: what the kernels of a GPU take in vectors.
TEST(NormBackward, RowsOfModels) {
  Rng rng(8);
  Context ctx;
  struct Case {
    std::int64_t rows;
    std::int64_t channels;
    std::int64_t group_size;
  };
  for (const Case& c :
       {Case{1, 768, 0}, Case{37, 768, 0}, Case{300, 64, 0}, Case{5, 1536, 0}, Case{9, 4096, 512},
        Case{3, 5120, 0}, Case{17, 5120, 0}, Case{2, 8192, 0}, Case{2, 8704, 0}, Case{6, 24, 8}})
    for (const DType dtype : kDtypes)
      for (const NormKind kind : kKinds)
        for (const bool gated : {false, true})
          for (const bool option : {false, true}) {
            const Dims shape{c.rows, c.channels};
            const DType stream = gated || !option ? dtype : DType::f32;
            const auto tensor = [&](DType type) { return random_tensor(rng, shape, type, -2.0, 3.0); };
            NormBackwardArgs args{.x = tensor(stream),
                                  .weight = random_tensor(rng, {c.channels}, DType::f32, 0.5, 2.0),
                                  .eps = 1e-5,
                                  .group_size = c.group_size,
                                  .norm_before_gate = option,
                                  .dout = tensor(dtype),
                                  .dx = tensor(stream),
                                  .dweight = random_tensor(rng, {c.channels}),
                                  .path = fast()};
            if (gated) {
              // A column range of the in-projection's output.
              args.z =
                  random_tensor(rng, {c.rows, c.channels + 64}, dtype, -3.0, 3.0).slice(1, 8, c.channels + 8);
              args.dz = Tensor::zeros({c.rows, c.channels + 64}, dtype).slice(1, 8, c.channels + 8);
            } else {
              args.dresidual = args.dx;
              if (kind == NormKind::layer) args.dbias = random_tensor(rng, {c.channels});
              args.dx_rounded = Tensor::zeros(shape, dtype);
            }
            SCOPED_TRACE(name_of(kind, args));
            const Gradients expected = expected_of(ctx, kind, args);
            run(ctx, kind, args);
            // Sums of f32 over many rows.
            const double tolerance = c.rows > 50 ? 3e-5 : 1e-5;
            expect_close(args.dx, expected.dx, 1e-5 + rounding_of(stream), "dx");
            if (args.dx_rounded) expect_same_bits(args.dx_rounded, args.dx.to(dtype), "dx_rounded");
            if (args.dz) expect_close(args.dz, expected.dz, 1e-5 + rounding_of(dtype), "dz");
            expect_close(args.dweight, expected.dweight, tolerance, "dweight");
            if (args.dbias) expect_close(args.dbias, expected.dbias, tolerance, "dbias");
            if (::testing::Test::HasFailure()) return;
          }
}

// More rows of each group than a GPU works on at once: their shares have two lengths.
TEST(NormBackward, ManyRows) {
  Rng rng(12);
  Context ctx;
  const Dims shape{101, 4096};
  for (const bool gated : {false, true}) {
    const DType dtype = gated ? DType::bf16 : DType::f32;
    const auto tensor = [&] { return random_tensor(rng, shape, dtype, -2.0, 3.0); };
    NormBackwardArgs args{.x = tensor(),
                          .weight = random_tensor(rng, {shape[1]}, DType::f32, 0.5, 2.0),
                          .z = gated ? tensor() : Tensor(),
                          .eps = 1e-5,
                          .group_size = 8,
                          .norm_before_gate = false,
                          .dout = tensor(),
                          .dx = Tensor::zeros(shape, dtype),
                          .dz = gated ? Tensor::zeros(shape, dtype) : Tensor(),
                          .dweight = random_tensor(rng, {shape[1]}),
                          .path = fast()};
    SCOPED_TRACE(name_of(NormKind::rms, args));
    const Gradients expected = expected_of(ctx, NormKind::rms, args);
    run(ctx, NormKind::rms, args);
    expect_close(args.dx, expected.dx, 1e-5 + rounding_of(dtype), "dx");
    if (gated) expect_close(args.dz, expected.dz, 1e-5 + rounding_of(dtype), "dz");
    expect_close(args.dweight, expected.dweight, 3e-5, "dweight");
  }
}

TEST(NormBackward, NamesWhatIsWrong) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 6});
  const auto message = [&](NormBackwardArgs args) {
    if (!args.x) args.x = x;
    if (!args.dout) args.dout = Tensor::zeros({2, 6});
    return message_of([&] { norm_backward(ctx, NormKind::rms, args); });
  };
  EXPECT_EQ(message_of([&] { norm_backward(ctx, NormKind::layer, {}); }),
            "[layer_norm_backward] x is missing");
  EXPECT_EQ(message_of([&] { norm_backward(ctx, NormKind::rms, {.x = x}); }),
            "[rms_norm_backward] dout is missing");
  EXPECT_EQ(message({.weight = Tensor::zeros({5})}),
            "[rms_norm_backward] weight has shape (5,), expected (6,): one value per channel");
  EXPECT_EQ(message({.dout = Tensor::zeros({2, 5})}),
            "[rms_norm_backward] dout has shape (2, 5), expected (2, 6): that of x");
  EXPECT_EQ(message({.dx = Tensor::zeros({2, 6}, DType::i32)}),
            "[rms_norm_backward] dx has dtype i32, expected f32, f64, bf16 or f16");
  EXPECT_EQ(message({.dz = Tensor::zeros({2, 6})}), "[rms_norm_backward] dz is wanted, but there is no z");
  EXPECT_EQ(message({.dx_rounded = Tensor::zeros({2, 6})}),
            "[rms_norm_backward] dx_rounded is wanted, but there is no dx");
  EXPECT_EQ(message({.dx = Tensor::zeros({2, 6}), .dx_rounded = x}),
            "[rms_norm_backward] dx_rounded overlaps x");
  EXPECT_EQ(message({.dweight = Tensor::zeros({6}, DType::bf16)}),
            "[rms_norm_backward] dweight has dtype bf16, expected f32: it is added to");
  EXPECT_EQ(message({.group_size = 4}),
            "[rms_norm_backward] group_size is 4, expected a divisor of the 6 channels");
  EXPECT_EQ(message({.x = x.to(DType::f64), .path = NormPath::simd}),
            "[rms_norm_backward] the simd path has no f64, expected f32, bf16 or f16");
  EXPECT_EQ(message({.dx = x}), "[rms_norm_backward] dx overlaps x");
  const Tensor wide = Tensor::zeros({2, 12});
  EXPECT_EQ(message({.dout = wide.slice(1, 0, 6), .dx = wide.slice(1, 5, 11)}),
            "[rms_norm_backward] dx overlaps dout without being the same view");
  EXPECT_EQ(message({.dout = wide.slice(1, 0, 6), .dx = wide.slice(1, 6, 12)}), "");
  EXPECT_EQ(message({.z = x, .dx = wide.slice(1, 0, 6), .dz = wide.slice(1, 0, 6)}),
            "[rms_norm_backward] dx overlaps dz");
}

}  // namespace
}  // namespace krait
