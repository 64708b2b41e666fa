#include "krait/ops/norm.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <vector>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "ops/norm/kernels.h"
#include "ops/norm/norm_cases.h"

namespace krait {
namespace {

using namespace testing;

// The vectorised path: on the CPU, or the device's own.
NormPath fast() { return testing::on_gpu() ? NormPath::automatic : NormPath::simd; }

NormResult run(Context& ctx, NormKind kind, const NormArgs& args) {
  return testing::run(ctx, kind == NormKind::rms ? rms_norm : layer_norm, args);
}
NormResult run_rms(Context& ctx, const NormArgs& args) { return run(ctx, NormKind::rms, args); }
NormResult run_layer(Context& ctx, const NormArgs& args) { return run(ctx, NormKind::layer, args); }

// The same problem in f64.
NormArgs widened(const NormArgs& args) {
  NormArgs result = args;
  result.x = to_f64(args.x);
  result.weight = to_f64(args.weight);
  result.bias = to_f64(args.bias);
  result.residual = to_f64(args.residual);
  result.z = to_f64(args.z);
  result.out = Tensor();
  result.residual_out = Tensor();
  result.residual_in_fp32 = false;
  result.prenorm = true;
  result.path = NormPath::reference;
  return result;
}

TEST(Norm, DefinitionByHand) {
  Context ctx;
  for (const NormPath path : {NormPath::reference, fast()}) {
    const Tensor x = Tensor::from<float>({1.0F, 3.0F, -1.0F, 5.0F});
    const Tensor weight = Tensor::from<float>({1.0F, 2.0F, 1.0F, 1.0F});
    const Tensor rms = run_rms(ctx, {.x = x, .weight = weight, .eps = 0.0, .path = path}).out;
    expect_close(rms, Tensor::from<float>({1.0F / 3, 2.0F, -1.0F / 3, 5.0F / 3}), 1e-6, "rms");
    const Tensor layer = run_layer(ctx, {.x = x, .bias = weight, .eps = 0.0, .path = path}).out;
    const float rstd = 1.0F / std::sqrt(5.0F);
    expect_close(layer,
                 Tensor::from<float>({1.0F - rstd, 2.0F + rstd, 1.0F - 3.0F * rstd, 1.0F + 3.0F * rstd}),
                 1e-6, "layer");
    const Tensor pairs = run_rms(ctx, {.x = x, .eps = 4.0, .group_size = 2, .path = path}).out;
    expect_close(pairs,
                 Tensor::from<float>({1.0F / 3, 1.0F, -1.0F / std::sqrt(17.0F), 5.0F / std::sqrt(17.0F)}),
                 1e-6, "groups");
  }
}

TEST(Norm, GateBeforeAndAfter) {
  Context ctx;
  const auto silu = [](float z) { return z / (1.0F + std::exp(-z)); };
  const Tensor x = Tensor::from<float>({3.0F, 4.0F});
  const Tensor z = Tensor::from<float>({-1.0F, 2.0F});
  const float a = 3.0F * silu(-1.0F);
  const float b = 4.0F * silu(2.0F);
  const float rms = std::sqrt((a * a + b * b) / 2);
  for (const NormPath path : {NormPath::reference, fast()}) {
    const Tensor before =
        run_rms(ctx, {.x = x, .z = z, .eps = 0.0, .norm_before_gate = true, .path = path}).out;
    const float scale = 1.0F / std::sqrt(12.5F);
    expect_close(before, Tensor::from<float>({3.0F * scale * silu(-1.0F), 4.0F * scale * silu(2.0F)}), 1e-6,
                 "norm before gate");
    const Tensor after =
        run_rms(ctx, {.x = x, .z = z, .eps = 0.0, .norm_before_gate = false, .path = path}).out;
    expect_close(after, Tensor::from<float>({a / rms, b / rms}), 1e-6, "gate before norm");
  }
}

// Random combinations of everything, on each instruction set, against f64.
TEST(Norm, SimdMatchesTheReference) {
  on_each_target([] {
    Rng rng(11);
    Context ctx(ContextOptions{.threads = 2});
    for (int trial = 0; trial < 150; ++trial) {
      const NormSizes sizes = random_sizes(rng, 9);
      const auto tensor = [&] {
        return random_tensor(rng, sizes.shape, random_dtype(rng), -2.0, 3.0,
                             static_cast<int>(pick(rng, 0, 3)));
      };
      const auto vector = [&] {
        return random_tensor(rng, {sizes.channels}, random_dtype(rng), 0.5, 2.0,
                             static_cast<int>(pick(rng, 0, 3)));
      };
      NormArgs args;
      args.x = tensor();
      if (coin(rng)) args.weight = vector();
      if (coin(rng, 0.3)) args.bias = vector();
      if (coin(rng)) args.residual = tensor();
      if (coin(rng)) args.z = tensor();
      args.group_size = sizes.group_size;
      args.norm_before_gate = coin(rng);
      args.prenorm = coin(rng);
      args.residual_in_fp32 = coin(rng);
      if (coin(rng, 0.3)) args.out = tensor();
      if (coin(rng, 0.3)) args.residual_out = tensor();
      args.eps = 1e-3;
      args.path = fast();
      for (const NormKind kind : kKinds) {
        SCOPED_TRACE(concat("trial ", trial, " shape ", sizes.shape, " groups of ", sizes.group_size, " x ",
                            args.x.dtype(), " kind ", kind == NormKind::rms ? "rms" : "layer", " z ",
                            args.z.defined(), " residual ", args.residual.defined()));
        const NormResult expected = norm(ctx, kind, widened(args));
        const NormResult found = run(ctx, kind, args);
        expect_close(found.out, expected.out, 4e-6 + rounding_of(found.out.dtype()), "out");
        EXPECT_EQ(found.residual.defined(), args.prenorm || args.residual_out.defined());
        if (found.residual)
          expect_close(found.residual, args.residual ? expected.residual : args.x,
                       rounding_of(found.residual.dtype()), "residual");
        if (::testing::Test::HasFailure()) return;
      }
    }
  });
}

TEST(Norm, ReferencePathsAgree) {
  Rng rng(5);
  Context ctx;
  for (const DType dtype : kDtypes) {
    NormArgs args{
        .x = random_tensor(rng, {3, 20}, dtype), .z = random_tensor(rng, {3, 20}, dtype), .group_size = 5};
    args.path = NormPath::reference;
    const Tensor narrow = run_rms(ctx, args).out;
    EXPECT_EQ(narrow.dtype(), dtype);
    expect_close(narrow, run_rms(ctx, widened(args)).out, rounding_of(dtype), "out");
  }
}

TEST(Norm, ResidualDtype) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 3}, DType::bf16);
  const Tensor r = Tensor::zeros({2, 3}, DType::f16);
  EXPECT_FALSE(run_rms(ctx, {.x = x, .residual = r}).residual.defined());
  EXPECT_EQ(run_rms(ctx, {.x = x, .prenorm = true}).residual.dtype(), DType::bf16);
  EXPECT_EQ(run_rms(ctx, {.x = x, .residual = r, .prenorm = true}).residual.dtype(), DType::f16);
  EXPECT_EQ(run_rms(ctx, {.x = x, .residual = r, .prenorm = true, .residual_in_fp32 = true}).residual.dtype(),
            DType::f32);
  EXPECT_EQ(run_rms(ctx, {.x = x, .residual = r}).out.dtype(), DType::bf16);
}

// What is normalised is the unrounded sum, whatever dtype the residual is kept in.
TEST(Norm, NormalisesTheUnroundedResidual) {
  Context ctx;
  for (const NormPath path : {NormPath::reference, fast()}) {
    const Tensor x = Tensor::from<float>({0.001F, -0.001F});
    const Tensor residual = Tensor::from<float>({1.0F, 1.0F}).to(DType::bf16);
    const Tensor out =
        run_layer(ctx, {.x = x, .residual = residual, .eps = 0.0, .prenorm = true, .path = path}).out;
    expect_close(out, Tensor::from<float>({1.0F, -1.0F}), 1e-3, "out");
  }
}

TEST(Norm, InPlace) {
  Rng rng(7);
  Context ctx;
  for (const NormPath path : {NormPath::reference, fast()})
    for (int layout = 0; layout < 4; ++layout) {
      SCOPED_TRACE(layout);
      const Tensor x = random_tensor(rng, {4, 3, 37}, DType::f32, -1.0, 1.0, layout);
      const Tensor residual = random_tensor(rng, {4, 3, 37}, DType::bf16, -1.0, 1.0, layout);
      const NormResult expected =
          run_rms(ctx, {.x = x.clone(), .residual = residual.clone(), .prenorm = true, .path = path});
      const NormResult found =
          run_rms(ctx, {.x = x, .residual = residual, .out = x, .residual_out = residual, .path = path});
      EXPECT_EQ(found.out.raw(), x.raw());
      EXPECT_EQ(found.residual.raw(), residual.raw());
      expect_same_bits(x, expected.out, "out");
      expect_same_bits(residual, expected.residual, "residual");
    }
}

TEST(Norm, EmptyShapes) {
  Context ctx;
  for (const NormPath path : {NormPath::reference, fast()})
    for (const NormKind kind : kKinds)
      for (const Dims& shape : {Dims{0}, Dims{0, 5}, Dims{3, 0}, Dims{2, 0, 4}}) {
        SCOPED_TRACE(concat(shape));
        const NormResult result = run(ctx, kind, {.x = Tensor::zeros(shape), .prenorm = true, .path = path});
        EXPECT_EQ(result.out.shape(), shape);
        EXPECT_EQ(result.residual.shape(), shape);
      }
}

// The variance is that of differences: a large mean cancels nothing away.
TEST(Norm, LargeMean) {
  Context ctx;
  std::vector<float> values(300);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = 4096.0F + (i % 2 == 0 ? 0.25F : -0.25F);
  const Tensor out = run_layer(ctx, {.x = Tensor::from(values), .eps = 0.0, .path = fast()}).out;
  for (std::int64_t i = 0; i < 300; ++i)
    ASSERT_NEAR(out.data<float>()[i], i % 2 == 0 ? 1.0 : -1.0, 1e-6) << i;
}

TEST(Norm, NanStaysInItsRow) {
  Context ctx;
  for (const NormPath path : {NormPath::reference, fast()}) {
    const Tensor x = Tensor::zeros({3, 21});
    x.fill(1.0);
    x.data<float>()[21 + 20] = NAN;
    const Tensor out = run_rms(ctx, {.x = x, .path = path}).out;
    for (std::int64_t i = 0; i < 63; ++i) EXPECT_EQ(std::isnan(out.data<float>()[i]), i / 21 == 1) << i;
  }
}

TEST(Norm, ThreadsDoNotChangeBits) {
  Rng rng(8);
  const Tensor x = random_tensor(rng, {203, 301});
  const Tensor z = random_tensor(rng, {203, 301}, DType::bf16);
  Tensor first;
  for (const int threads : {1, 2, 3, 7}) {  // on a GPU: four runs
    Context ctx(ContextOptions{.threads = threads});
    const Tensor out = run_rms(ctx, {.x = x, .z = z}).out;
    if (!first) first = out;
    expect_same_bits(out, first, concat(threads, " threads"));
  }
}

// Shapes of models, in the layouts that they have: what the kernels of a GPU take in vectors.
TEST(Norm, RowsOfModels) {
  Rng rng(9);
  Context ctx;
  struct Case {
    std::int64_t rows;
    std::int64_t channels;
    std::int64_t group_size;
  };
  for (const Case& c :
       {Case{1, 768, 0}, Case{37, 768, 0}, Case{700, 64, 0}, Case{5, 1536, 0}, Case{9, 4096, 512},
        Case{3, 5120, 0}, Case{9, 5120, 0}, Case{2, 16384, 0}, Case{2, 17408, 0}, Case{6, 24, 8}})
    for (const DType dtype : kDtypes)
      for (const NormKind kind : kKinds)
        for (const bool gated : {false, true})
          for (const bool option : {false, true}) {
            SCOPED_TRACE(concat(c.rows, " x ", c.channels, " groups of ", c.group_size, ' ', dtype,
                                kind == NormKind::rms ? " rms" : " layer", gated ? " gated" : " residual",
                                option));
            const Dims shape{c.rows, c.channels};
            NormArgs args{.x = random_tensor(rng, shape, dtype, -2.0, 3.0),
                          .weight = random_tensor(rng, {c.channels}, option ? dtype : DType::f32, 0.5, 2.0),
                          .eps = 1e-5,
                          .group_size = c.group_size,
                          .norm_before_gate = option,
                          .path = fast()};
            if (kind == NormKind::layer) args.bias = random_tensor(rng, {c.channels}, dtype);
            if (gated) {
              // A column range of the in-projection's output.
              args.z = random_tensor(rng, {c.rows, c.channels + 64}, dtype).slice(1, 8, c.channels + 8);
            } else {
              args.residual = random_tensor(rng, shape, option ? DType::f32 : dtype);
              args.prenorm = true;
            }
            const NormResult expected = norm(ctx, kind, widened(args));
            const NormResult found = run(ctx, kind, args);
            expect_close(found.out, expected.out, 4e-6 + rounding_of(dtype), "out");
            if (!gated)
              expect_close(found.residual, expected.residual, rounding_of(found.residual.dtype()),
                           "residual");
            if (::testing::Test::HasFailure()) return;
          }
}

// A residual stream in f32 that gives activations of 16 bits.
TEST(Norm, NarrowsAStream) {
  Rng rng(11);
  Context ctx;
  for (const Dims& shape : {Dims{37, 768}, Dims{5, 2560}, Dims{3, 100}})
    for (const DType dtype : {DType::bf16, DType::f16})
      for (const NormKind kind : kKinds) {
        SCOPED_TRACE(concat(shape, ' ', dtype, kind == NormKind::rms ? " rms" : " layer"));
        const NormArgs args{.x = random_tensor(rng, shape, DType::f32, -2.0, 3.0),
                            .weight = random_tensor(rng, {shape[1]}, DType::f32, 0.5, 2.0),
                            .eps = 1e-5,
                            .out = Tensor::empty(shape, dtype)};
        const NormResult expected = norm(ctx, kind, widened(args));
        expect_close(run(ctx, kind, args).out, expected.out, 4e-6 + rounding_of(dtype), "out");
      }
}

// More rows than a GPU works on at once, with several warps and with one warp for each row.
TEST(Norm, ManyRows) {
  Rng rng(10);
  Context ctx;
  for (const Dims& shape : {Dims{2000, 768}, Dims{6000, 64}}) {
    SCOPED_TRACE(concat(shape));
    const NormArgs args{.x = random_tensor(rng, shape, DType::bf16),
                        .z = random_tensor(rng, shape, DType::bf16),
                        .norm_before_gate = false,
                        .path = fast()};
    expect_close(run_rms(ctx, args).out, rms_norm(ctx, widened(args)).out, 4e-6 + rounding_of(DType::bf16),
                 "out");
  }
}

TEST(Norm, GpuPlans) {
  using norm_kernels::choose_gpu_plan;
  using norm_kernels::GpuPlan;
  const auto equal = [](const GpuPlan& a, const GpuPlan& b) {
    return a.vectors == b.vectors && a.warps == b.warps && a.groups == b.groups;
  };
  EXPECT_TRUE(equal(choose_gpu_plan(5120, 2), {.vectors = 2, .warps = 10, .groups = 1}));
  EXPECT_TRUE(equal(choose_gpu_plan(5120, 4), {.vectors = 2, .warps = 10, .groups = 1}));
  EXPECT_TRUE(equal(choose_gpu_plan(256, 2), {.vectors = 1, .warps = 1, .groups = 4}));
  EXPECT_TRUE(equal(choose_gpu_plan(768, 2), {.vectors = 1, .warps = 3, .groups = 1}));
  EXPECT_TRUE(equal(choose_gpu_plan(512, 2), {.vectors = 2, .warps = 1, .groups = 4}));
  EXPECT_TRUE(equal(choose_gpu_plan(1536, 4), {.vectors = 2, .warps = 3, .groups = 1}));
  EXPECT_TRUE(equal(choose_gpu_plan(7936, 2), {.vectors = 2, .warps = 16, .groups = 1}));
  EXPECT_TRUE(equal(choose_gpu_plan(16384, 4), {.vectors = 4, .warps = 16, .groups = 1}));
  EXPECT_EQ(choose_gpu_plan(8200, 2).vectors, 0);
  EXPECT_EQ(choose_gpu_plan(100, 4).vectors, 0);    // no whole vectors
  EXPECT_EQ(choose_gpu_plan(16392, 4).vectors, 0);  // too wide
  for (std::int64_t size = 8; size <= 16384; size += 8) {
    const GpuPlan plan = choose_gpu_plan(size, 4);
    ASSERT_GE(plan.vectors * plan.warps * 256, size);
    ASSERT_LE(plan.warps * plan.groups * 32, 512);
  }

  const auto plan_of = [](const Tensor& x, const Tensor& residual, const Tensor& out) {
    norm_kernels::Problem problem;
    problem.group_size = x.size(-1);
    problem.x = norm_kernels::Rows(x);
    problem.out = norm_kernels::Rows(out);
    if (residual) problem.residual = norm_kernels::Rows(residual);
    return choose_gpu_plan(problem).vectors;
  };
  const Tensor x = Tensor::zeros({4, 3, 64}, DType::bf16);
  EXPECT_GT(plan_of(x, {}, x), 0);
  EXPECT_GT(plan_of(x, Tensor::zeros({4, 3, 64}), x), 0);
  EXPECT_EQ(plan_of(x, Tensor::zeros({4, 3, 64}, DType::f16), x), 0);  // three dtypes
  EXPECT_EQ(plan_of(x, {}, Tensor::zeros({4, 3, 64})), 0);             // out of another dtype
  EXPECT_EQ(plan_of(Tensor::zeros({2, 256}), {}, Tensor::zeros({2, 256})), 1);
  EXPECT_EQ(plan_of(Tensor::zeros({2, 1536}), {}, Tensor::zeros({2, 1536})), 2);
  EXPECT_EQ(plan_of(Tensor::zeros({2, 8192}), {}, Tensor::zeros({2, 8192})), 2);
  const Tensor widest = Tensor::zeros({2, 8200}, DType::bf16);
  EXPECT_EQ(plan_of(widest, {}, widest), 4);
  const Tensor wide_rows = Tensor::zeros({4, 3, 72}, DType::bf16);
  EXPECT_GT(plan_of(wide_rows.slice(2, 8, 72), {}, x), 0);
  EXPECT_EQ(plan_of(wide_rows.slice(2, 4, 68), {}, x), 0);  // off the boundary of a vector
  EXPECT_EQ(plan_of(Tensor::zeros({4, 64, 3}, DType::bf16).transpose(1, 2), {}, x), 0);
  EXPECT_EQ(plan_of(Tensor::zeros({3, 4, 64}, DType::bf16).transpose(0, 1), {}, x),
            0);  // two strides of rows
}

TEST(Norm, PathsAndBackend) {
  if (testing::on_gpu()) GTEST_SKIP();
  Context ctx;
  const Tensor x = Tensor::zeros({2, 3});
  rms_norm(ctx, {.x = x});
  EXPECT_NE(ctx.backend().find("simd"), std::string::npos) << ctx.backend();
  layer_norm(ctx, {.x = x.to(DType::f64)});
  EXPECT_NE(ctx.backend().find("reference"), std::string::npos) << ctx.backend();
  ctx.set_reference(true);
  rms_norm(ctx, {.x = x});
  EXPECT_NE(ctx.backend().find("reference"), std::string::npos) << ctx.backend();
}

TEST(Norm, NamesWhatIsWrong) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 6});
  EXPECT_EQ(message_of([&] { rms_norm(ctx, {.x = x, .weight = Tensor::zeros({5})}); }),
            "[rms_norm] weight has shape (5,), expected (6,): one value per channel");
  EXPECT_EQ(message_of([&] { layer_norm(ctx, {.x = x, .residual = Tensor::zeros({6})}); }),
            "[layer_norm] residual has shape (6,), expected (2, 6): that of x");
  EXPECT_EQ(message_of([&] { rms_norm(ctx, {.x = x, .group_size = 4}); }),
            "[rms_norm] group_size is 4, expected a divisor of the 6 channels");
  EXPECT_EQ(message_of([&] { rms_norm(ctx, {.x = x, .eps = -1.0}); }),
            "[rms_norm] eps is -1, expected 0 or more");
  EXPECT_EQ(message_of([&] { rms_norm(ctx, {}); }), "[rms_norm] x is missing");
  EXPECT_EQ(message_of([&] { rms_norm(ctx, {.x = Tensor::zeros({2}, DType::i64)}); }),
            "[rms_norm] x has dtype i64, expected f32, f64, bf16 or f16");
  EXPECT_EQ(message_of([&] { rms_norm(ctx, {.x = x.to(DType::f64), .path = NormPath::simd}); }),
            "[rms_norm] the simd path has no f64, expected f32, bf16 or f16");
  EXPECT_NE(message_of([&] { rms_norm(ctx, {.x = Tensor::zeros({})}); }), "");
}

}  // namespace
}  // namespace krait
