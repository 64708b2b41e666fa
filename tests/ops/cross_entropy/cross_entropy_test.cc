#include "krait/ops/cross_entropy.h"

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
#include "krait/ops/linear.h"

namespace krait {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

Tensor random_tensor(const Dims& shape, DType dtype, std::uint64_t seed, float scale = 1.0F) {
  const Tensor t = Tensor::empty(shape);
  Rng rng(seed);
  for (float& value : t.span<float>()) value = scale * rng.normal();
  return t.to(dtype);
}

Tensor targets_of(std::int64_t count, std::int64_t vocabulary) {
  std::vector<std::int64_t> targets;
  for (std::int64_t t = 0; t < count; ++t) targets.push_back(t % 4 == 2 ? -100 : (t * 7919) % vocabulary);
  return Tensor::from(targets);
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// The definition: -sum_v q_v log softmax(logits)_v with q = (1 - s) onehot(target) + s / V.
double loss_by_definition(const Tensor& row, std::int64_t target, double smoothing) {
  const Tensor wide = row.to(DType::f64).contiguous();
  const auto x = wide.span<double>();
  double largest = -kInfinity;
  for (const double value : x) largest = std::max(largest, value);
  double sum = 0.0;
  for (const double value : x) sum += std::exp(value - largest);
  const double lse = largest + std::log(sum);
  double loss = 0.0;
  for (std::size_t v = 0; v < x.size(); ++v) {
    const double q = (static_cast<std::int64_t>(v) == target ? 1.0 - smoothing : 0.0) +
                     smoothing / static_cast<double>(x.size());
    if (q != 0.0) loss -= q * (x[v] - lse);
  }
  return loss;
}

void check(Context& ctx, const CrossEntropyArgs& args, double tolerance) {
  const CrossEntropyResult result = testing::run(ctx, cross_entropy, args);
  const Tensor losses = result.losses.to(DType::f64);
  const Tensor targets = args.targets.to(DType::i64).contiguous();
  double sum = 0.0;
  std::int64_t count = 0;
  for (std::int64_t t = 0; t < args.logits.size(0); ++t) {
    const std::int64_t target = targets.data<std::int64_t>()[t];
    if (target == args.ignore_index) {
      EXPECT_EQ(losses.data<double>()[t], 0.0) << "token " << t;
      continue;
    }
    const double want = loss_by_definition(args.logits.select(0, t), target, args.label_smoothing);
    EXPECT_NEAR(losses.data<double>()[t], want, tolerance * (1.0 + std::fabs(want))) << "token " << t;
    sum += want;
    ++count;
  }
  EXPECT_EQ(result.count, count);
  EXPECT_NEAR(result.mean, count == 0 ? 0.0 : sum / static_cast<double>(count),
              tolerance * (1.0 + std::fabs(sum)));
}

TEST(CrossEntropy, AgreesWithItsDefinition) {
  for (const bool reference : {false, true}) {
    Context ctx(ContextOptions{.reference = reference});
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
      for (const std::int64_t vocabulary : {1, 2, 7, 8, 33, 511, 512, 1000}) {
        for (const double smoothing : {0.0, 0.1}) {
          SCOPED_TRACE(concat(dtype, " V ", vocabulary, " smoothing ", smoothing, " reference ", reference));
          check(ctx,
                {.logits = random_tensor({9, vocabulary}, dtype, 1, 5.0F),
                 .targets = targets_of(9, vocabulary),
                 .label_smoothing = smoothing},
                dtype == DType::f64 ? 1e-14 : 1e-6);
        }
      }
    }
  }
}

TEST(CrossEntropy, EverySimdTarget) {
  Context ctx;
  const auto targets = hwy::SupportedTargets() & HWY_TARGETS;
  for (auto rest = targets; rest != 0; rest &= rest - 1) {
    SCOPED_TRACE(hwy::TargetName(rest & -rest));
    hwy::SetSupportedTargetsForTest(rest & -rest);
    hwy::GetChosenTarget().Update(rest & -rest);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
      check(ctx, {.logits = random_tensor({5, 700}, dtype, 2, 4.0F), .targets = targets_of(5, 700)}, 1e-6);
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(CrossEntropy, LogsumexpIsThatOfTheRow) {
  Context ctx;
  const Tensor logits = Tensor::from(std::vector<double>{0.0, 0.0, std::log(3.0), std::log(5.0)}, {2, 2});
  const auto result = testing::run(
      ctx, cross_entropy, {.logits = logits, .targets = Tensor::from(std::vector<std::int64_t>{0, -100})});
  EXPECT_DOUBLE_EQ(result.logsumexp.data<double>()[0], std::log(2.0));
  EXPECT_DOUBLE_EQ(result.logsumexp.data<double>()[1], std::log(8.0));
  EXPECT_DOUBLE_EQ(result.mean, std::log(2.0));
  EXPECT_EQ(result.count, 1);
}

TEST(CrossEntropy, LargeAndMaskedLogitsAreStable) {
  Context ctx;
  for (const DType dtype : {DType::f32, DType::f64}) {
    const Tensor logits = Tensor::from(std::vector<double>{3e38, 3e38, -3e38,            //
                                                           -3e38, -3e38, -3e38,          //
                                                           -kInfinity, 1.0, -kInfinity,  //
                                                           -kInfinity, 1.0, 1.0},
                                       {4, 3})
                              .to(dtype);
    const auto result =
        testing::run(ctx, cross_entropy,
                     {.logits = logits, .targets = Tensor::from(std::vector<std::int64_t>{0, 2, 1, 0})});
    const Tensor losses = result.losses.to(DType::f64);
    const double rounding = dtype == DType::f64 ? 1e30 : 4e31;  // of the logits themselves
    EXPECT_NEAR(losses.data<double>()[0], std::log(2.0), rounding);
    EXPECT_NEAR(losses.data<double>()[1], std::log(3.0), rounding);
    EXPECT_EQ(losses.data<double>()[2], 0.0);
    EXPECT_EQ(losses.data<double>()[3], kInfinity);
  }
}

TEST(CrossEntropy, NanLogitsGiveNanLosses) {
  Context ctx;
  for (const std::int64_t where : {0, 3, 9, 600}) {
    const Tensor logits = random_tensor({2, 601}, DType::f32, 3);
    logits.data<float>()[where] = std::numeric_limits<float>::quiet_NaN();
    const auto result = testing::run(
        ctx, cross_entropy, {.logits = logits, .targets = Tensor::from(std::vector<std::int64_t>{1, 1})});
    EXPECT_TRUE(std::isnan(result.losses.data<float>()[0])) << where;
    EXPECT_FALSE(std::isnan(result.losses.data<float>()[1])) << where;
    EXPECT_TRUE(std::isnan(result.mean)) << where;
  }
}

TEST(CrossEntropy, TakesAnyStridesAndBothIndexTypes) {
  Context ctx;
  const Tensor logits = random_tensor({6, 45}, DType::f32, 4);
  const Tensor targets = targets_of(6, 45);
  check(ctx, {.logits = logits.transpose(0, 1).clone().transpose(0, 1), .targets = targets}, 1e-6);
  check(ctx,
        {.logits = random_tensor({6, 50}, DType::bf16, 4).slice(1, 5, 50), .targets = targets.to(DType::i32)},
        1e-6);
  const Tensor spread = Tensor::zeros({6, 2}, DType::i64);
  spread.select(1, 1).copy_from(targets);
  check(ctx, {.logits = logits, .targets = spread.select(1, 1), .label_smoothing = 0.3}, 1e-6);
  check(ctx, {.logits = logits, .targets = Tensor::zeros({6}, DType::i32), .ignore_index = 0}, 1e-6);
}

TEST(CrossEntropy, EmptyAndAllIgnored) {
  Context ctx;
  const auto none = testing::run(
      ctx, cross_entropy, {.logits = Tensor::zeros({0, 5}), .targets = Tensor::zeros({0}, DType::i64)});
  EXPECT_EQ(none.losses.shape(), (Dims{0}));
  EXPECT_EQ(none.mean, 0.0);
  const Tensor ignored = Tensor::zeros({3}, DType::i64);
  ignored.fill(-100);
  const auto all = testing::run(ctx, cross_entropy, {.logits = Tensor::zeros({3, 5}), .targets = ignored});
  EXPECT_EQ(all.count, 0);
  EXPECT_EQ(all.mean, 0.0);
}

TEST(CrossEntropy, ThreadsDoNotMatter) {
  const Tensor logits = random_tensor({7, 5000}, DType::f32, 5);
  Context one(ContextOptions{.threads = 1});
  Context many(ContextOptions{.threads = 3});
  const auto a = testing::run(one, cross_entropy, {.logits = logits, .targets = targets_of(7, 5000)});
  const auto b = testing::run(many, cross_entropy, {.logits = logits, .targets = targets_of(7, 5000)});
  EXPECT_EQ(std::memcmp(a.losses.raw(), b.losses.raw(), a.losses.nbytes()), 0);
  EXPECT_EQ(a.mean, b.mean);
}

TEST(CrossEntropy, SaysWhatIsWrong) {
  Context ctx;
  const Tensor logits = Tensor::zeros({2, 5});
  const auto text = [&](const CrossEntropyArgs& args) {
    return message_of([&] { (void)testing::run(ctx, cross_entropy, args); });
  };
  EXPECT_EQ(text({.logits = logits, .targets = Tensor::from(std::vector<std::int64_t>{0, 5})}),
            "[cross_entropy] target 5 at position 1 is outside [0, 5) and not ignore_index (-100)");
  EXPECT_EQ(text({.logits = logits, .targets = Tensor::zeros({3}, DType::i64)}),
            "[cross_entropy] targets has shape (3,), expected (2,): one for each token");
  const Tensor targets = Tensor::zeros({2}, DType::i64);
  EXPECT_EQ(text({.logits = logits, .targets = targets, .label_smoothing = 1.0}),
            "[cross_entropy] label_smoothing is 1, expected [0, 1)");
  EXPECT_NE(text({.logits = logits, .targets = targets, .label_smoothing = std::nan("")}), "");
  EXPECT_NE(text({.logits = logits, .targets = Tensor::zeros({2})}), "");
  EXPECT_NE(text({.logits = Tensor::zeros({2, 5, 1}), .targets = targets}), "");
  EXPECT_NE(text({.logits = Tensor::zeros({2, 5}, DType::i32), .targets = targets}), "");
  EXPECT_NE(text({.targets = targets}), "");
  EXPECT_NE(text({.logits = logits}), "");
}

TEST(LinearCrossEntropy, EqualsHeadThenLoss) {
  for (const bool reference : {false, true}) {
    Context ctx(ContextOptions{.reference = reference});
    for (const DType dtype : {DType::f32, DType::bf16}) {
      // Many rows may be rounded to the dtype of the weight, and few are not: rounding must change nothing.
      const Tensor x = random_tensor({23, 40}, dtype, 1).to(DType::f32);
      const Tensor weight = random_tensor({77, 40}, dtype, 2);
      const Tensor bias = random_tensor({77}, DType::f32, 3);
      const Tensor targets = targets_of(23, 77);
      const Tensor logits = testing::run(ctx, linear, {.x = x, .weight = weight, .bias = bias});
      const auto want =
          testing::run(ctx, cross_entropy, {.logits = logits, .targets = targets, .label_smoothing = 0.1});
      for (const std::int64_t block : {0, 1, 5, 23, 100}) {
        SCOPED_TRACE(concat(dtype, " block ", block, " reference ", reference));
        const auto got = testing::run(ctx, linear_cross_entropy,
                                      {.x = x,
                                       .weight = weight,
                                       .bias = bias,
                                       .targets = targets,
                                       .label_smoothing = 0.1,
                                       .block = block});
        EXPECT_EQ(got.count, want.count);
        EXPECT_NEAR(got.mean, want.mean, 1e-5);
        for (std::int64_t t = 0; t < 23; ++t) {
          EXPECT_NEAR(got.losses.data<float>()[t], want.losses.data<float>()[t], 1e-4) << "token " << t;
          EXPECT_NEAR(got.logsumexp.data<float>()[t], want.logsumexp.data<float>()[t], 1e-4) << "token " << t;
        }
      }
    }
  }
}

TEST(LinearCrossEntropy, HoldsNoMoreThanABlockOfLogits) {
  if (testing::on_gpu()) GTEST_SKIP();  // it is the pool of the device that holds it
  Context ctx;
  const Tensor x = random_tensor({256, 8}, DType::f32, 1);
  const Tensor weight = random_tensor({4096, 8}, DType::f32, 2);
  (void)testing::run(ctx, linear_cross_entropy,
                     {.x = x, .weight = weight, .targets = targets_of(256, 4096), .block = 16});
  EXPECT_LT(ctx.pool_bytes(), std::size_t{256} * 4096 * 4 / 2);
}

TEST(LinearCrossEntropy, EmptyInputsAndF64) {
  Context ctx;
  const auto none = testing::run(ctx, linear_cross_entropy,
                                 {.x = Tensor::zeros({0, 3}),
                                  .weight = Tensor::zeros({5, 3}),
                                  .targets = Tensor::zeros({0}, DType::i64)});
  EXPECT_EQ(none.count, 0);
  const auto wide = testing::run(ctx, linear_cross_entropy,
                                 {.x = Tensor::zeros({2, 3}, DType::f64),
                                  .weight = Tensor::zeros({5, 3}, DType::f64),
                                  .targets = Tensor::zeros({2}, DType::i64)});
  EXPECT_DOUBLE_EQ(wide.mean, std::log(5.0));
}

TEST(LinearCrossEntropy, SaysWhatIsWrong) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 3});
  const Tensor weight = Tensor::zeros({5, 3});
  const Tensor targets = Tensor::zeros({2}, DType::i64);
  const auto text = [&](const LinearCrossEntropyArgs& args) {
    return message_of([&] { (void)testing::run(ctx, linear_cross_entropy, args); });
  };
  EXPECT_EQ(text({.x = x, .weight = Tensor::zeros({5, 4}), .targets = targets}),
            "[linear_cross_entropy] weight has shape (5, 4), expected (V, 3): x has shape (2, 3)");
  EXPECT_NE(text({.x = x, .weight = weight, .targets = targets, .block = -1}), "");
  EXPECT_NE(text({.x = x, .weight = weight, .targets = Tensor::from(std::vector<std::int64_t>{0, 9})}), "");
  EXPECT_NE(text({.x = x, .weight = weight, .targets = targets, .label_smoothing = -0.1}), "");
  EXPECT_NE(text({.weight = weight, .targets = targets}), "");
}

}  // namespace
}  // namespace krait
