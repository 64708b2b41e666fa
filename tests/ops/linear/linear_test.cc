#include "krait/ops/linear.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "ops/linear/few_rows.h"
#include "ops/linear/kernels.h"

namespace krait {
namespace {

const std::vector<DType> kStored = {DType::f32, DType::bf16, DType::f16};

// linear, on the GPU where the tests run for one.
Tensor run_linear(Context& ctx, const LinearArgs& args) { return testing::run(ctx, linear, args); }

// The paths that take any dtypes and sizes.
std::vector<LinearPath> general_paths() {
  if (testing::on_gpu()) return {LinearPath::gemv, LinearPath::cublaslt, LinearPath::plain};
  return {LinearPath::gemv, LinearPath::gemm};
}

Tensor random_tensor(const Dims& shape, DType dtype, std::uint64_t seed) {
  const Tensor t = Tensor::empty(shape);
  Rng rng(seed);
  for (float& value : t.span<float>()) value = rng.normal();
  return t.to(dtype);
}

// A copy of `t` whose last size has stride 2 and whose rows have gaps.
Tensor spread(const Tensor& t) {
  Dims shape = t.shape();
  shape.push_back(2);
  const Tensor wide = Tensor::empty(shape, t.dtype());
  wide.fill(777.0);
  const Tensor view = wide.select(-1, 0);
  view.copy_from(t);
  return view;
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// Compares `got` with the f64 reference. An element may differ by the rounding of `in` f32 sums and of
// the dtype of the destination.
void expect_close(Context& ctx, LinearArgs args, const Tensor& before, const Tensor& got) {
  args.path = LinearPath::reference;
  args.out = (before ? before : got).to(DType::f64).clone();
  const Tensor want = run_linear(ctx, args).contiguous();
  const Tensor have = got.to(DType::f64).contiguous();
  const double rounding = got.dtype() == DType::bf16 ? 0x1p-8 : got.dtype() == DType::f16 ? 0x1p-10 : 0.0;
  const double sums = 1e-6 * std::sqrt(static_cast<double>(args.weight.size(1)) + 1.0) * 4.0;
  double worst = 0.0;
  std::int64_t where = -1;
  for (std::int64_t i = 0; i < want.numel(); ++i) {
    const double a = want.data<double>()[i];
    const double b = have.data<double>()[i];
    const double excess = std::fabs(a - b) - rounding * std::fabs(a);
    if (!(excess <= worst)) {
      worst = excess;
      where = i;
    }
  }
  EXPECT_TRUE(worst <= sums) << "element " << where << " is " << have.data<double>()[where] << ", expected "
                             << want.data<double>()[where] << " within " << sums;
}

struct Case {
  std::int64_t rows;
  std::int64_t in;
  std::int64_t out;
};

const std::vector<Case> kCases = {{1, 1, 1},   {1, 7, 5},     {2, 16, 9},     {3, 31, 26},
                                  {4, 32, 24}, {5, 65, 25},   {7, 100, 1},    {9, 48, 130},
                                  {17, 3, 33}, {20, 300, 6},  {6, 64, 16},    {1, 768, 51},
                                  {2, 40, 90}, {1, 2560, 37}, {16, 2080, 38}, {70, 130, 150}};

void check(Context& ctx, const Case& c, LinearPath path, DType x, DType weight, DType out) {
  SCOPED_TRACE(concat("rows ", c.rows, " in ", c.in, " out ", c.out, " path ", static_cast<int>(path), " x ",
                      x, " weight ", weight, " out ", out));
  // cuBLASLt gets x in the dtype of the weight: values that are exact in it.
  const DType values = path == LinearPath::cublaslt ? weight : x;
  LinearArgs args{.x = random_tensor({c.rows, c.in}, values, 1).to(x),
                  .weight = random_tensor({c.out, c.in}, weight, 2),
                  .out = Tensor::empty({c.rows, c.out}, out),
                  .path = path};
  args.out.fill(std::numeric_limits<double>::quiet_NaN());
  expect_close(ctx, args, {}, run_linear(ctx, args));

  args.accumulate = true;
  args.out = random_tensor({c.rows, c.out}, out, 4);
  const Tensor before = args.out.clone();
  expect_close(ctx, args, before, run_linear(ctx, args));

  args.bias = random_tensor({c.out}, weight, 3);
  args.out.copy_from(before);
  expect_close(ctx, args, before, run_linear(ctx, args));
}

void check_all_dtypes(Context& ctx, LinearPath path) {
  for (const Case& c : kCases)
    for (const DType x : kStored)
      for (const DType weight : kStored) check(ctx, c, path, x, weight, x);
  for (const DType x : kStored)
    for (const DType out : kStored) check(ctx, {5, 33, 40}, path, x, DType::bf16, out);
}

TEST(Linear, EveryPathAgreesWithTheReference) {
  Context ctx;
  for (const LinearPath path : general_paths()) check_all_dtypes(ctx, path);
}

TEST(Linear, EverySimdTargetAgreesWithReference) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  Context ctx;
  const auto targets = hwy::SupportedTargets() & HWY_TARGETS;
  for (auto rest = targets; rest != 0; rest &= rest - 1) {
    const auto target = rest & -rest;
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    for (const LinearPath path : {LinearPath::gemv, LinearPath::gemm}) {
      for (const DType dtype : kStored) {
        check(ctx, {1, 77, 30}, path, DType::f32, dtype, DType::f32);
        check(ctx, {2, 64, 9}, path, DType::f32, dtype, dtype);
        check(ctx, {7, 65, 49}, path, DType::f32, dtype, DType::f32);
        check(ctx, {16, 261, 35}, path, dtype, dtype, dtype);
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(Linear, OnednnAgreesWithReference) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  if (onednn_products() == OnednnProducts::none) GTEST_SKIP() << "this build has no oneDNN";
  Context ctx;
  for (int round = 0; round < 2; ++round) {  // the second takes kept primitives
    for (const Case& c : kCases)
      for (const DType x : kStored) check(ctx, c, LinearPath::onednn, x, DType::f32, x);
  }
}

TEST(Linear, OnednnMultipliesBf16WhereTheProcessorDoes) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  Context ctx;
  const Tensor weight = random_tensor({5, 33}, DType::bf16, 2);
  const Tensor x = random_tensor({40, 33}, DType::bf16, 1);  // exact in bf16, so that no rounding is added
  const LinearArgs args{.x = x, .weight = weight, .out = Tensor::empty({40, 5}), .path = LinearPath::onednn};
  if (onednn_products() == OnednnProducts::f32_and_bf16) {
    expect_close(ctx, args, {}, run_linear(ctx, args));
  } else {
    EXPECT_NE(message_of([&] { (void)linear(ctx, args); }), "");
  }
}

// Infinities, NaN, subnormals and the largest numbers pass the widening of weights.
TEST(Linear, WeightsOfEveryBitPatternAreWidened) {
  Context ctx;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const Tensor weight = Tensor::empty({65536, 1}, dtype);
    auto* bits = static_cast<std::uint16_t*>(weight.raw());
    for (int i = 0; i < 65536; ++i) bits[i] = static_cast<std::uint16_t>(i);
    const Tensor want = weight.to(DType::f32);
    const Tensor one = Tensor::empty({1, 1});
    one.fill(1.0);
    const auto targets = hwy::SupportedTargets() & HWY_TARGETS;
    for (auto rest = targets; rest != 0; rest &= rest - 1) {
      hwy::SetSupportedTargetsForTest(rest & -rest);
      hwy::GetChosenTarget().Update(rest & -rest);
      for (const LinearPath path : general_paths()) {
        SCOPED_TRACE(concat(hwy::TargetName(rest & -rest), " ", dtype, " path ", static_cast<int>(path)));
        const Tensor got = run_linear(ctx, {.x = one, .weight = weight, .path = path});
        int wrong = 0;
        for (int i = 0; i < 65536; ++i) {
          const float a = want.data<float>()[i];
          const float b = got.data<float>()[i];
          if (std::isnan(a) ? !std::isnan(b) : a != b) ++wrong;
        }
        EXPECT_EQ(wrong, 0);
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

std::vector<LinearPath> f32_paths() {
  if (testing::on_gpu()) return general_paths();
  std::vector<LinearPath> paths = {LinearPath::reference, LinearPath::gemv, LinearPath::gemm};
  if (onednn_products() != OnednnProducts::none) paths.push_back(LinearPath::onednn);
  return paths;
}

TEST(Linear, TakesAnyStridesOfXBiasAndOut) {
  Context ctx;
  const Tensor weight = random_tensor({37, 45}, DType::f32, 2);
  const Tensor bias = spread(random_tensor({37}, DType::f32, 3));
  const Tensor x = random_tensor({2, 3, 5, 45}, DType::f32, 1);
  const Tensor out = random_tensor({2, 3, 5, 37}, DType::f32, 4);
  const std::vector<Tensor> xs = {x, spread(x), x.transpose(0, 2).clone().transpose(0, 2),
                                  x.permute({3, 0, 1, 2}).clone().permute({1, 2, 3, 0}),
                                  x.slice(2, 0, 1).expand({2, 3, 5, 45})};
  const std::vector<std::function<Tensor()>> outs = {
      [&] { return out.clone(); }, [&] { return spread(out); },
      [&] { return out.transpose(0, 2).clone().transpose(0, 2); },
      [&] {
        return out.permute({3, 0, 1, 2}).clone().permute({1, 2, 3, 0});
      }};
  for (const LinearPath path : f32_paths()) {
    for (std::size_t i = 0; i < xs.size(); ++i) {
      for (std::size_t o = 0; o < outs.size(); ++o) {
        for (const bool accumulate : {false, true}) {
          SCOPED_TRACE(
              concat("path ", static_cast<int>(path), " x ", i, " out ", o, " accumulate ", accumulate));
          const LinearArgs args{.x = xs[i],
                                .weight = weight,
                                .bias = bias,
                                .out = outs[o](),
                                .accumulate = accumulate,
                                .path = path};
          const Tensor before = args.out.clone();
          const Tensor got = run_linear(ctx, args);
          EXPECT_EQ(got.raw(), args.out.raw());
          expect_close(ctx, args, before, got);
        }
      }
    }
  }
}

TEST(Linear, WritesNothingBetweenStridedElements) {
  Context ctx;
  const Tensor x = random_tensor({6, 20}, DType::f32, 1);
  for (const DType dtype : kStored) {
    for (const LinearPath path : general_paths()) {
      const Tensor wide = Tensor::empty({6, 19, 2}, dtype);
      wide.fill(777.0);
      run_linear(
          ctx, {.x = x, .weight = random_tensor({19, 20}, dtype, 2), .out = wide.select(2, 0), .path = path});
      const Tensor gaps = wide.select(2, 1).to(DType::f32).clone();
      const float kept = static_cast<float>(dtype == DType::bf16 ? 776.0 : 777.0);
      for (const float value : gaps.span<float>()) EXPECT_EQ(value, kept);
    }
  }
}

TEST(Linear, TakesAnyStridesOfTheWeight) {
  Context ctx;
  const Tensor x = random_tensor({5, 40}, DType::f32, 1);
  for (const DType dtype : kStored) {
    const Tensor weight = random_tensor({21, 40}, dtype, 2);
    const std::vector<Tensor> weights = {weight.transpose(0, 1).clone().transpose(0, 1), spread(weight),
                                         random_tensor({21, 50}, dtype, 2).slice(1, 3, 43),
                                         weight.slice(0, 4, 5).expand({21, 40})};
    for (std::size_t i = 0; i < weights.size(); ++i) {
      SCOPED_TRACE(concat("weight ", i, " ", dtype));
      LinearArgs args{.x = x, .weight = weights[i], .path = general_paths()[1]};
      if (args.path == LinearPath::cublaslt) args.x = x.to(dtype);
      expect_close(ctx, args, {}, run_linear(ctx, args));
      if (testing::on_gpu()) {
        args.path = LinearPath::plain;
        expect_close(ctx, args, {}, run_linear(ctx, args));
      }
      args.path = LinearPath::automatic;
      expect_close(ctx, args, {}, run_linear(ctx, args));
      if (weights[i].stride(1) == 1) {
        args.path = LinearPath::gemv;
        expect_close(ctx, args, {}, run_linear(ctx, args));
      }
    }
  }
}

// A weight that ends where readable memory may end: the sanitizers see a read beyond it.
TEST(Linear, ReadsNothingBeyondTheWeight) {
  Context ctx;
  for (const DType dtype : kStored) {
    for (const std::int64_t in : {1, 5, 33, 63, 127}) {
      const Tensor source = random_tensor({3, in}, dtype, 2);
      for (const std::size_t shift : {std::size_t{0}, size_of(dtype)}) {
        std::vector<unsigned char> exact(source.nbytes() + shift);
        std::memcpy(exact.data() + shift, source.raw(), source.nbytes());
        const Tensor weight = Tensor::wrap(exact.data() + shift, source.shape(), dtype);
        for (const LinearPath path : general_paths()) {
          SCOPED_TRACE(concat(dtype, " in ", in, " shift ", shift, " path ", static_cast<int>(path)));
          const LinearArgs args{.x = random_tensor({2, in}, dtype, 1), .weight = weight, .path = path};
          expect_close(ctx, args, {}, run_linear(ctx, args));
        }
      }
    }
  }
}

TEST(Linear, EmptySizes) {
  Context ctx;
  const Tensor bias = random_tensor({4}, DType::f32, 1);
  for (const LinearPath path : f32_paths()) {
    SCOPED_TRACE(static_cast<int>(path));
    const auto run = [&](const Dims& x, const Dims& weight, const Tensor& b) {
      return run_linear(ctx,
                        {.x = Tensor::zeros(x), .weight = Tensor::zeros(weight), .bias = b, .path = path});
    };
    EXPECT_EQ(run({2, 0, 3}, {4, 3}, bias).shape(), (Dims{2, 0, 4}));
    EXPECT_EQ(run({2, 3}, {0, 3}, {}).shape(), (Dims{2, 0}));
    const Tensor only_bias = run({5, 0}, {4, 0}, bias);
    for (int r = 0; r < 5; ++r)
      for (int o = 0; o < 4; ++o) EXPECT_EQ(only_bias.data<float>()[r * 4 + o], bias.data<float>()[o]);
    const Tensor zero = run({1, 0}, {4, 0}, {});
    for (const float value : zero.span<float>()) EXPECT_EQ(value, 0.0F);
  }
}

// The same bits whatever the number of threads, run after run, and for a row alone as for a row among others.
TEST(Linear, RowsAndThreadsDoNotMatter) {
  const Tensor x = random_tensor({11, 515}, DType::f32, 1);
  for (const DType dtype : kStored) {
    const Tensor weight = random_tensor({203, 515}, dtype, 2);
    const Tensor bias = random_tensor({203}, DType::f32, 3);
    for (const LinearPath path : f32_paths()) {
      if (path == LinearPath::onednn) continue;
      SCOPED_TRACE(concat(dtype, " path ", static_cast<int>(path)));
      Context one(ContextOptions{.threads = 1});
      const Tensor want = run_linear(one, {.x = x, .weight = weight, .bias = bias, .path = path});
      for (const int threads : {2, 3, 7}) {
        Context many(ContextOptions{.threads = threads});
        const Tensor got = run_linear(many, {.x = x, .weight = weight, .bias = bias, .path = path});
        EXPECT_EQ(std::memcmp(got.raw(), want.raw(), want.nbytes()), 0) << threads << " threads";
      }
      // Kernels of a GPU are made for a number of rows.
      if (testing::on_gpu() && path != LinearPath::plain) continue;
      for (const auto& [begin, end] : {std::pair{0, 1}, {4, 5}, {3, 5}, {2, 5}, {1, 8}, {10, 11}}) {
        const Tensor got =
            run_linear(one, {.x = x.slice(0, begin, end), .weight = weight, .bias = bias, .path = path});
        const Tensor part = want.slice(0, begin, end);
        EXPECT_EQ(std::memcmp(got.raw(), part.raw(), part.nbytes()), 0) << "rows " << begin << " to " << end;
      }
    }
  }
}

TEST(Linear, ReferenceIsExactInF64) {
  Context ctx;
  const double third = 1.0 / 3.0;
  const Tensor x = Tensor::from(std::vector<double>{1.0, third, -2.0}, {3});
  const Tensor weight = Tensor::from(std::vector<double>{3.0, 1.0, 0.5, 0.0, 3.0, 1.0}, {2, 3});
  const Tensor bias = Tensor::from(std::vector<double>{0.25, 10.0}, {2});
  const Tensor y = linear(ctx, {.x = x, .weight = weight, .bias = bias});
  EXPECT_EQ(ctx.backend(), "linear: reference");
  ASSERT_EQ(y.dtype(), DType::f64);
  EXPECT_DOUBLE_EQ(y.data<double>()[0], 0.25 + 3.0 + third - 1.0);
  EXPECT_DOUBLE_EQ(y.data<double>()[1], 10.0 + 1.0 - 2.0);
}

TEST(Linear, OutHasTheDtypeOfX) {
  Context ctx;
  for (const DType dtype : kStored) {
    const Tensor y = run_linear(
        ctx, {.x = random_tensor({3, 8}, dtype, 1), .weight = random_tensor({4, 8}, DType::f32, 2)});
    EXPECT_EQ(y.dtype(), dtype);
    EXPECT_EQ(y.shape(), (Dims{3, 4}));
  }
}

TEST(Linear, ContextAsksForTheReference) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  Context ctx(ContextOptions{.reference = true});
  const Tensor x = random_tensor({1, 8}, DType::f32, 1);
  const Tensor weight = random_tensor({4, 8}, DType::f32, 2);
  linear(ctx, {.x = x, .weight = weight});
  EXPECT_EQ(ctx.backend(), "linear: reference");
  linear(ctx, {.x = x, .weight = weight, .path = LinearPath::gemv});
  EXPECT_EQ(ctx.backend(), concat("linear: gemv (", simd_target(), ")"));
}

TEST(Linear, ALoopOfEqualStepsAllocatesNothing) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  Context ctx;
  const Tensor x = random_tensor({3, 100}, DType::f32, 1);
  const Tensor weight = random_tensor({50, 100}, DType::bf16, 2);
  for (const LinearPath path : {LinearPath::gemv, LinearPath::gemm}) {
    linear(ctx, {.x = x, .weight = weight, .bias = random_tensor({50}, DType::bf16, 3), .path = path});
    const std::size_t held = ctx.pool_bytes();
    for (int i = 0; i < 3; ++i)
      linear(ctx, {.x = x, .weight = weight, .bias = random_tensor({50}, DType::bf16, 3), .path = path});
    EXPECT_EQ(ctx.pool_bytes(), held);
  }
}

TEST(Linear, ChoosesItsPath) {
  for (const DType dtype : kStored) {
    for (const OnednnProducts onednn :
         {OnednnProducts::none, OnednnProducts::f32, OnednnProducts::f32_and_bf16}) {
      EXPECT_EQ(choose_linear_path(1, 768, 3072, dtype, onednn), LinearPath::gemv);
      EXPECT_EQ(choose_linear_path(16, 768, 50280, dtype, onednn), LinearPath::gemv);
      EXPECT_EQ(choose_linear_path(17, 768, 3072, dtype, onednn), LinearPath::gemm);
      EXPECT_EQ(choose_linear_path(512, 48, 64, dtype, onednn), LinearPath::gemm);
      const bool bf16_products = dtype == DType::bf16 && onednn == OnednnProducts::f32_and_bf16;
      EXPECT_EQ(choose_linear_path(512, 768, 3072, dtype, onednn),
                bf16_products ? LinearPath::onednn : LinearPath::gemm);
    }
  }
}

TEST(Linear, ChoosesItsPathOnAGpu) {
  EXPECT_EQ(choose_gpu_linear_path(1, 768, 3072, DType::bf16), LinearPath::gemv);
  EXPECT_EQ(choose_gpu_linear_path(16, 768, 50280, DType::f32), LinearPath::gemv);
  EXPECT_EQ(choose_gpu_linear_path(17, 768, 3072, DType::f16), LinearPath::cublaslt);
  EXPECT_EQ(choose_gpu_linear_path(3, 0, 5, DType::f32), LinearPath::plain);
}

// Every row of the weight has its place, every step its tile, and the tiles fit.
TEST(Linear, DividesWeightsOfFewRowsOnAGpu) {
  using linear_detail::gpu::choose_gemv_plan;
  using linear_detail::gpu::gemv_exchange_bytes;
  constexpr std::int64_t kShared = 227 * 1024;
  for (const std::int64_t rows : {1, 2, 4, 8, 16})
    for (const std::int64_t in : {1, 7, 8, 48, 160, 256, 768, 1536, 2560, 5120, 50000})
      for (const std::int64_t out : {1, 80, 768, 3352, 10576, 50280})
        for (const DType dtype : kStored)
          for (const std::int64_t shared_memory : {64 * 1024, 227 * 1024}) {
            SCOPED_TRACE(concat(rows, " x ", in, " x ", out, " ", dtype, " in ", shared_memory));
            const auto plan = choose_gemv_plan(rows, in, out, dtype, 132, shared_memory);
            const std::int64_t piece = dtype == DType::f32 ? 4 : 8;
            EXPECT_TRUE(plan.lanes == 4 || plan.lanes == 8 || plan.lanes == 16 || plan.lanes == 32);
            EXPECT_TRUE(plan.splits == 1 || plan.lanes == 32);
            EXPECT_LE(plan.splits, plan.steps);
            EXPECT_GE(plan.steps * plan.lanes * piece, in);
            EXPECT_GE(plan.tile, 1);
            EXPECT_LE(plan.tile, plan.steps);
            EXPECT_TRUE(plan.tile == plan.steps || plan.tile % plan.splits == 0);
            const std::int64_t x_bytes = rows * plan.tile * plan.lanes * piece * 4;
            EXPECT_LE(x_bytes, 96 * 1024);
            EXPECT_LE(x_bytes + gemv_exchange_bytes(rows), shared_memory);
            EXPECT_GE(plan.units * plan.rows_of_unit(), out);
            EXPECT_LT((plan.units - 1) * plan.rows_of_unit(), out);
          }
  EXPECT_EQ(choose_gemv_plan(1, 768, 50280, DType::bf16, 132, kShared).splits, 1);
  EXPECT_EQ(choose_gemv_plan(1, 2560, 10576, DType::bf16, 132, kShared).splits, 1);
  EXPECT_EQ(choose_gemv_plan(1, 5120, 2560, DType::bf16, 132, kShared).splits, 4);
  EXPECT_EQ(choose_gemv_plan(1, 48, 1536, DType::bf16, 132, kShared).lanes, 8);
}

TEST(Linear, DividesProductsAmongThreads) {
  using linear_detail::choose_grid;
  using linear_detail::Grid;
  EXPECT_EQ(choose_grid(512, 3072, 768, 1), (Grid{1, 1}));
  EXPECT_EQ(choose_grid(512, 3072, 768, 2), (Grid{1, 2}));
  EXPECT_EQ(choose_grid(4096, 16, 768, 2), (Grid{2, 1}));
  EXPECT_EQ(choose_grid(8, 8, 8, 16), (Grid{1, 1}));
  EXPECT_EQ(choose_grid(0, 0, 0, 4), (Grid{1, 1}));
  for (const std::int64_t threads : {3, 7, 64}) {
    const Grid grid = choose_grid(1024, 3072, 768, threads);
    EXPECT_LE(grid.rows * grid.columns, threads);
    EXPECT_GT(grid.rows * grid.columns, threads / 2);
  }
}

TEST(Linear, SaysWhatIsWrong) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 7});
  const Tensor weight = Tensor::zeros({3, 7});
  const auto text = [&](const LinearArgs& args) { return message_of([&] { (void)linear(ctx, args); }); };
  EXPECT_EQ(text({.x = x, .weight = Tensor::zeros({3, 8})}),
            "[linear] x has shape (2, 7), expected (..., 8): weight has shape (3, 8)");
  EXPECT_EQ(text({.x = x, .weight = Tensor::zeros({7})}),
            "[linear] weight has shape (7,), expected (out, in)");
  EXPECT_EQ(text({.x = x, .weight = weight, .bias = Tensor::zeros({4})}),
            "[linear] bias has shape (4,), expected (3,): weight has shape (3, 7)");
  EXPECT_EQ(text({.x = x, .weight = weight, .out = Tensor::zeros({3, 2})}),
            "[linear] out has shape (3, 2), expected (2, 3)");
  EXPECT_NE(text({.weight = weight}), "");
  EXPECT_NE(text({.x = x}), "");
  EXPECT_NE(text({.x = x, .weight = weight, .accumulate = true}), "");
  EXPECT_NE(text({.x = Tensor::zeros({2, 7}, DType::i32), .weight = weight}), "");
  EXPECT_NE(text({.x = Tensor::zeros({}), .weight = weight}), "");
  EXPECT_NE(text({.x = x, .weight = Tensor::zeros({7, 3}).transpose(0, 1), .path = LinearPath::gemv}), "");
  for (const LinearPath path : {LinearPath::gemv, LinearPath::gemm, LinearPath::onednn})
    EXPECT_NE(text({.x = x, .weight = Tensor::zeros({3, 7}, DType::f64), .path = path}), "");
  EXPECT_NE(text({.x = x, .weight = Tensor::zeros({3, 7}, DType::f16), .path = LinearPath::onednn}), "");
  EXPECT_EQ(text({.x = x, .weight = weight, .path = LinearPath::cublaslt}),
            "[linear] the paths cublaslt and plain are those of a GPU, this is cpu");
  if (!testing::on_gpu()) return;
  const auto text_on_gpu = [&](const LinearArgs& args) {
    return message_of([&] { (void)testing::run(ctx, linear, args); });
  };
  EXPECT_EQ(text_on_gpu({.x = x, .weight = weight, .path = LinearPath::gemm}),
            concat("[linear] a path of the CPU was asked for on ", name_of(testing::test_device()),
                   ", expected automatic, gemv, cublaslt or plain"));
  EXPECT_EQ(message_of([&] { (void)linear(testing::gpu_context(), {.x = x, .weight = weight}); }),
            concat("[linear] x is on cpu, expected ", name_of(testing::test_device())));
}

// Blocks take equal shares, and what they need fits into shared memory.
TEST(Linear, PlansOfFewRows) {
  using linear_detail::choose_few_rows_plan;
  using linear_detail::FewRowsPlan;
  constexpr std::int64_t kShared = 227 * 1024;
  for (const std::int64_t rows : {1, 4, 8, 9, 16})
    for (const std::int64_t in : {8, 256, 768, 1536, 2560, 5120})
      for (const std::int64_t out : {1, 80, 132, 768, 3352, 10576, 50280}) {
        SCOPED_TRACE(concat(rows, " x ", in, " x ", out));
        const FewRowsPlan plan = choose_few_rows_plan(rows, in, out, 132, kShared);
        ASSERT_GT(plan.tiles, 0);
        EXPECT_EQ(plan.blocks, std::min<std::int64_t>(out, 132));
        EXPECT_GE(plan.padded_in(), in);
        EXPECT_GE(plan.x_stride, plan.padded_in());
        EXPECT_LE(plan.shared, kShared);
        EXPECT_GE(plan.slots / plan.tiles, 2);
        EXPECT_LE(plan.tiles, rows > 8 ? 2 : 4);
      }
  EXPECT_EQ(choose_few_rows_plan(1, 768, 768, 132, kShared).tiles, 1);    // 6 rows of weights a block
  EXPECT_EQ(choose_few_rows_plan(1, 768, 3352, 132, kShared).tiles, 4);   // 26
  EXPECT_EQ(choose_few_rows_plan(17, 768, 768, 132, kShared).tiles, 0);   // too many rows of x
  EXPECT_EQ(choose_few_rows_plan(1, 767, 768, 132, kShared).tiles, 0);    // not in pieces of 16 bytes
  EXPECT_EQ(choose_few_rows_plan(16, 40960, 64, 132, kShared).tiles, 0);  // x is too large
}

TEST(Linear, AddsAnAddend) {
  Context ctx;
  for (const LinearPath path : general_paths())
    for (const Case& c : kCases)
      for (const DType dtype : kStored)
        for (const bool in_place : {false, true}) {
          SCOPED_TRACE(concat("rows ", c.rows, " in ", c.in, " out ", c.out, " path ", static_cast<int>(path),
                              ' ', dtype, " in place ", in_place));
          const Tensor addend = random_tensor({c.rows, c.out}, DType::f32, 4);
          const Tensor before = addend.clone();
          LinearArgs args{.x = random_tensor({c.rows, c.in}, dtype, 1),
                          .weight = random_tensor({c.out, c.in}, dtype, 2),
                          .bias = random_tensor({c.out}, dtype, 3),
                          .out = in_place ? addend : Tensor(),
                          .addend = addend,
                          .path = path};
          const Tensor got = run_linear(ctx, args);
          EXPECT_EQ(got.dtype(), DType::f32);
          args.addend = {};
          args.accumulate = true;
          expect_close(ctx, args, before, got);
        }
}

// Sizes beside those of whole tiles and steps, either layout of the weight, rows with gaps between them.
TEST(Linear, ShortSumsOnAGpu) {
  if (!testing::on_gpu()) GTEST_SKIP() << "of a GPU";
  Context ctx;
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const Case& c :
         {Case{17, 8, 8}, Case{64, 48, 128}, Case{77, 80, 136}, Case{300, 160, 1000}, Case{1025, 192, 264}})
      for (const bool by_columns : {false, true})
        for (const bool accumulate : {false, true}) {
          SCOPED_TRACE(concat(dtype, " rows ", c.rows, " in ", c.in, " out ", c.out, " by columns ",
                              by_columns, " accumulate ", accumulate));
          const Tensor weight =
              by_columns ? random_tensor({c.in, c.out + 16}, dtype, 2).slice(1, 8, c.out + 8).transpose(0, 1)
                         : random_tensor({c.out, c.in + 8}, dtype, 2).slice(1, 8, c.in + 8);
          const LinearArgs args{.x = random_tensor({c.rows, c.in + 24}, dtype, 1).slice(1, 16, c.in + 16),
                                .weight = weight,
                                .out = random_tensor({c.rows, c.out + 40}, dtype, 4).slice(1, 32, c.out + 32),
                                .accumulate = accumulate,
                                .path = LinearPath::cublaslt};
          const Tensor before = args.out.clone();
          expect_close(ctx, args, before, run_linear(ctx, args));
          if (accumulate) {
            EXPECT_EQ(testing::gpu_context().backend(), "linear: cuda short sums");
          }
        }
}

// The proposals for products of models with 768 channels and 32,768 tokens, in cuBLASLt's order, with the
// tile of each and its time on an H200.
TEST(Linear, ChoosesAmongProposals) {
  using linear_detail::gpu::choose_proposal;
  using linear_detail::gpu::ProductProposal;
  constexpr std::int64_t kTokens = 32768;
  const std::vector<ProductProposal> wide = {{20.727F},   // 192 x 192: 248 us
                                             {23.273F},   // 128 x 256: 249 us
                                             {37.273F}};  // 128 x 160: 209 us
  EXPECT_EQ(choose_proposal({kTokens, 768, 3072, DType::bf16}, wide, 132), 2U);
  const std::vector<ProductProposal> long_sums = {{5.818F},   // 256 x 128: 233 us
                                                  {9.318F}};  // 128 x 160: 240 us
  EXPECT_EQ(choose_proposal({kTokens, 3352, 768, DType::bf16}, long_sums, 132), 0U);
  const std::vector<ProductProposal> divided = {{0.242F, 4},   // 192 x 192: 114 us
                                                {0.273F, 3},   // 256 x 128: 126 us
                                                {0.455F, 2}};  // 128 x 160: 120 us
  EXPECT_EQ(choose_proposal({768, kTokens, 1536, DType::f32}, divided, 132), 0U);
  EXPECT_EQ(choose_proposal({64, 64, 64, DType::bf16}, std::vector<ProductProposal>{{0.0F}}, 132), 0U);
}

}  // namespace
}  // namespace krait
