#include "krait/ops/optimizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/core/random.h"

namespace krait {
namespace {

Tensor random(std::int64_t count, std::uint64_t seed, double low = -1.0, double high = 1.0) {
  Rng rng(seed);
  Tensor t = Tensor::empty({count});
  for (float& value : t.span<float>()) value = static_cast<float>(low + (high - low) * rng.uniform_double());
  return t;
}

// The operators on the device of the tests, which see what they wrote.
void run_adamw(Context& ctx, AdamWArgs args) {
  if (!testing::on_gpu()) return adamw(ctx, args);
  Context& gpu = testing::gpu_context();
  std::vector<AdamWTensor> moved(args.tensors.begin(), args.tensors.end());
  for (AdamWTensor& t : moved)
    for (Tensor* part : {&t.parameter, &t.gradient, &t.m, &t.v, &t.compute}) *part = gpu.to_device(*part);
  const auto own = args.tensors;
  args.tensors = moved;
  adamw(gpu, args);
  for (std::size_t i = 0; i < moved.size(); ++i) {
    gpu.copy(moved[i].parameter, own[i].parameter);
    gpu.copy(moved[i].m, own[i].m);
    gpu.copy(moved[i].v, own[i].v);
    if (own[i].compute) gpu.copy(moved[i].compute, own[i].compute);
  }
}

double run_norm(Context& ctx, std::span<const Tensor> tensors) {
  if (!testing::on_gpu()) return global_norm(ctx, tensors);
  std::vector<Tensor> moved;
  for (const Tensor& t : tensors) moved.push_back(testing::gpu_context().to_device(t));
  return global_norm(testing::gpu_context(), moved);
}

void run_average(Context& ctx, const AveragedTensor& t, double decay) {
  if (!testing::on_gpu()) return update_average(ctx, std::span(&t, 1), decay);
  Context& gpu = testing::gpu_context();
  const AveragedTensor moved{.average = gpu.to_device(t.average), .parameter = gpu.to_device(t.parameter)};
  update_average(gpu, std::span(&moved, 1), decay);
  gpu.copy(moved.average, t.average);
}

AdamWTensor some(std::int64_t count, std::uint64_t seed, bool decay) {
  return {.parameter = random(count, seed),
          .gradient = random(count, seed + 1),
          .m = random(count, seed + 2),
          .v = random(count, seed + 3, 0.0, 1.0),
          .decay = decay};
}

// Sizes around vectors and pieces.
const std::vector<std::int64_t>& sizes() {
  static const std::vector<std::int64_t> kSizes{0, 1, 7, 33, 65535, 65536, 65537, 140001};
  return kSizes;
}

TEST(AdamW, IsTheFormula) {
  Context ctx;
  for (const std::int64_t size : sizes())
    for (const std::int64_t step : {1, 2, 1000})
      for (const bool decay : {false, true}) {
        SCOPED_TRACE(concat(size, " elements, step ", step, decay ? ", decay" : ""));
        const AdamWTensor t = some(size, 5, decay);
        const Tensor p = t.parameter.clone();
        const Tensor m = t.m.clone();
        const Tensor v = t.v.clone();
        run_adamw(ctx, {.tensors = std::span(&t, 1),
                        .step = step,
                        .lr = 0.01,
                        .beta1 = 0.9,
                        .beta2 = 0.95,
                        .eps = 1e-3,
                        .weight_decay = 0.1,
                        .gradient_scale = 0.5});
        for (std::int64_t i = 0; i < size; ++i) {
          const double g = 0.5 * static_cast<double>(t.gradient.data<float>()[i]);
          const double m1 = 0.9 * static_cast<double>(m.data<float>()[i]) + 0.1 * g;
          const double v1 = 0.95 * static_cast<double>(v.data<float>()[i]) + 0.05 * g * g;
          const double m_hat = m1 / (1.0 - std::pow(0.9, step));
          const double v_hat = v1 / (1.0 - std::pow(0.95, step));
          const double before = static_cast<double>(p.data<float>()[i]) * (decay ? 1.0 - 0.01 * 0.1 : 1.0);
          ASSERT_NEAR(static_cast<double>(t.parameter.data<float>()[i]),
                      before - 0.01 * m_hat / (std::sqrt(v_hat) + 1e-3), 1e-6)
              << i;
          ASSERT_NEAR(static_cast<double>(t.m.data<float>()[i]), m1, 1e-6);
          ASSERT_NEAR(static_cast<double>(t.v.data<float>()[i]), v1, 1e-6);
        }
      }
}

TEST(AdamW, RoundsTheComputeCopyToNearest) {
  Context ctx;
  for (const DType dtype : {DType::bf16, DType::f16}) {
    AdamWTensor t = some(70001, 8, true);
    t.compute = Tensor::zeros({70001}, dtype);
    run_adamw(ctx, {.tensors = std::span(&t, 1)});
    const Tensor want = t.parameter.to(dtype);
    EXPECT_EQ(std::memcmp(t.compute.raw(), want.raw(), want.nbytes()), 0);
  }
}

TEST(AdamW, ThreadsChangeNoBit) {
  std::vector<Tensor> results;
  for (const int threads : {1, 3}) {
    Context ctx({.threads = threads});
    std::vector<AdamWTensor> tensors;
    for (const std::int64_t size : sizes())
      tensors.push_back(some(size, static_cast<std::uint64_t>(size), true));
    run_adamw(ctx, {.tensors = tensors, .step = 3, .weight_decay = 0.1});
    for (const AdamWTensor& t : tensors) results.push_back(t.parameter);
  }
  for (std::size_t i = 0; i < sizes().size(); ++i)
    EXPECT_EQ(std::memcmp(results[i].raw(), results[i + sizes().size()].raw(), results[i].nbytes()), 0);
}

TEST(AdamW, NamesWhatDoesNotFit) {
  Context ctx;
  AdamWTensor t = some(8, 1, false);
  t.m = Tensor::zeros({9});
  try {
    adamw(ctx, {.tensors = std::span(&t, 1)});
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "[adamw] m of tensor 0 is f32 (9,), expected contiguous f32 (8,)");
  }
}

// A table of tensors is kept from call to call: other tensors in their place must be seen.
TEST(AdamW, TensorsMayChangeFromCallToCall) {
  Context ctx;
  for (const std::int64_t size : {33, 1000, 33}) {
    const AdamWTensor t = some(size, static_cast<std::uint64_t>(size), false);
    const AdamWTensor other = some(size, static_cast<std::uint64_t>(size), false);
    run_adamw(ctx, {.tensors = std::span(&t, 1)});
    Context fresh;
    adamw(fresh, {.tensors = std::span(&other, 1)});
    for (std::int64_t i = 0; i < size; ++i)
      ASSERT_NEAR(t.parameter.data<float>()[i], other.parameter.data<float>()[i], 1e-6F) << size;
  }
}

TEST(AdamW, RefusesRatesThatAreNone) {
  Context ctx;
  const auto message = [&](const AdamWArgs& args) -> std::string {
    try {
      adamw(ctx, args);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(message({.lr = -1.0}), "[adamw] lr is -1, expected a finite number of at least 0");
  EXPECT_EQ(message({.eps = std::numeric_limits<double>::quiet_NaN()}),
            "[adamw] eps is nan, expected a finite number of at least 0");
  EXPECT_EQ(message({.weight_decay = std::numeric_limits<double>::infinity()}),
            "[adamw] weight_decay is inf, expected a finite number of at least 0");
  EXPECT_EQ(message({.lr = 0.0, .eps = 0.0, .weight_decay = 0.0}), "");
}

TEST(GlobalNorm, IsThatOfAllElementsForAnyThreads) {
  std::vector<Tensor> tensors;
  double sum = 0.0;
  for (const std::int64_t size : sizes()) {
    tensors.push_back(random(size, 3));
    for (const float value : tensors.back().span<float>()) sum += static_cast<double>(value) * value;
  }
  Context one({.threads = 1});
  Context three({.threads = 3});
  const double norm = run_norm(one, tensors);
  EXPECT_NEAR(norm, std::sqrt(sum), 1e-9 * norm);
  EXPECT_EQ(norm, run_norm(three, tensors));
  EXPECT_EQ(run_norm(one, {}), 0.0);
}

TEST(GlobalNorm, DoesNotHideWhatIsNotFinite) {
  Context ctx;
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    const Tensor t = random(100, 4);
    t.data<float>()[77] = bad;
    EXPECT_FALSE(std::isfinite(run_norm(ctx, std::span(&t, 1))));
  }
  // Squares of large gradients overflow f32, not f64.
  const Tensor large = Tensor::empty({2});
  large.fill(3e30);
  EXPECT_NEAR(run_norm(ctx, std::span(&large, 1)), 3e30 * std::sqrt(2.0), 1e24);
}

TEST(Average, MovesTowardsTheParameter) {
  Context ctx;
  for (const std::int64_t size : sizes()) {
    const AveragedTensor t{.average = random(size, 1), .parameter = random(size, 2)};
    const Tensor before = t.average.clone();
    run_average(ctx, t, 0.75);
    for (std::int64_t i = 0; i < size; ++i)
      ASSERT_NEAR(t.average.data<float>()[i],
                  0.75F * before.data<float>()[i] + 0.25F * t.parameter.data<float>()[i], 1e-6F);
  }
}

}  // namespace
}  // namespace krait
