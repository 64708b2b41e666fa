#include <gtest/gtest.h>

#include <cstring>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/ops/cross_entropy.h"
#include "krait/ops/linear.h"
#include "ops/finite_difference.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;
using test::expect_gradient;

Tensor some_targets(Rng& rng, std::int64_t count, std::int64_t vocabulary) {
  Tensor targets = Tensor::empty({count}, DType::i64);
  for (auto& target : targets.span<std::int64_t>()) target = rng.next_u32() % vocabulary;
  if (count > 2) targets.data<std::int64_t>()[1] = -100;
  return targets;
}

double total(const CrossEntropyResult& result) { return result.mean * static_cast<double>(result.count); }

TEST(CrossEntropyBackward, ReferenceIsTheDerivative) {
  Context ctx;
  Rng rng(1);
  for (const double smoothing : {0.0, 0.1}) {
    const Tensor logits = random_tensor(rng, {4, 7}, DType::f64, -3, 3);
    const Tensor targets = some_targets(rng, 4, 7);
    const Tensor dlogits = Tensor::empty({4, 7}, DType::f64);
    run(ctx, cross_entropy_backward,
        {.logits = logits,
         .targets = targets,
         .label_smoothing = smoothing,
         .scale = 0.5,
         .dlogits = dlogits});
    const auto loss = [&] {
      return 0.5 * total(run(ctx, cross_entropy,
                             {.logits = logits, .targets = targets, .label_smoothing = smoothing}));
    };
    expect_gradient(loss, logits, dlogits, "dlogits");
  }
}

TEST(CrossEntropyBackward, FusedReferenceIsTheDerivative) {
  Context ctx;
  Rng rng(1);
  const Tensor x = random_tensor(rng, {5, 3}, DType::f64, -1, 1);
  const Tensor weight = random_tensor(rng, {7, 3}, DType::f64, -1, 1);
  const Tensor bias = random_tensor(rng, {7}, DType::f64, -1, 1);
  LinearCrossEntropyArgs args{
      .x = x, .weight = weight, .bias = bias, .targets = some_targets(rng, 5, 7), .label_smoothing = 0.05};
  for (const std::int64_t block : {0, 1, 2}) {
    args.block = block;
    const Tensor dx = Tensor::empty(x.shape(), DType::f64);
    const Tensor dweight = Tensor::zeros(weight.shape(), DType::f64);
    const Tensor dbias = Tensor::zeros(bias.shape(), DType::f64);
    const CrossEntropyResult result =
        run(ctx, linear_cross_entropy_backward,
            {.forward = args, .scale = 2.0, .dx = dx, .dweight = dweight, .dbias = dbias});
    EXPECT_EQ(result.mean, run(ctx, linear_cross_entropy, args).mean);
    const auto loss = [&] { return 2.0 * total(run(ctx, linear_cross_entropy, args)); };
    expect_gradient(loss, x, dx, "dx");
    expect_gradient(loss, weight, dweight, "dweight");
    expect_gradient(loss, bias, dbias, "dbias");
  }
}

TEST(CrossEntropyBackward, FastPathAgreesWithTheReference) {
  Context ctx;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const std::int64_t vocabulary : {1, 5, 511, 512, 1300})
      for (const std::int64_t count : {0, 1, 33})
        for (const int layout : {0, kScattered}) {
          SCOPED_TRACE(
              concat(dtype, " ", count, " x ", vocabulary, layout == kScattered ? " scattered" : ""));
          Rng rng(7);
          const Tensor logits = random_tensor(rng, {count, vocabulary}, dtype, -9, 9, layout);
          const Tensor targets = some_targets(rng, count, vocabulary);
          const Tensor want = Tensor::empty({count, vocabulary}, DType::f64);
          run(ctx, cross_entropy_backward,
              {.logits = logits.to(DType::f64),
               .targets = targets,
               .label_smoothing = 0.1,
               .scale = 0.25,
               .dlogits = want});
          const Tensor found = Tensor::empty({count, vocabulary});
          run(ctx, cross_entropy_backward,
              {.logits = logits,
               .targets = targets,
               .label_smoothing = 0.1,
               .scale = 0.25,
               .dlogits = found});
          expect_close(found, want, 4e-6, 1e-6, "dlogits");
          // In place, in the dtype of the logits, on a logsumexp that was kept.
          const Tensor kept = run(ctx, cross_entropy, {.logits = logits, .targets = targets}).logsumexp;
          run(ctx, cross_entropy_backward,
              {.logits = logits,
               .targets = targets,
               .label_smoothing = 0.1,
               .logsumexp = kept,
               .scale = 0.25,
               .dlogits = logits});
          const double rounding = dtype == DType::f32 ? 4e-6 : dtype == DType::f16 ? 1e-3 : 5e-3;
          expect_close(logits, want, rounding, 1e-6, "in place");
        }
}

TEST(CrossEntropyBackward, FusedAgreesWithItsPartsForAnyThreads) {
  Rng rng(2);
  const Tensor x = random_tensor(rng, {150, 40}, DType::f32, -1, 1);
  const Tensor weight = random_tensor(rng, {333, 40}, DType::f32, -1, 1);
  const Tensor targets = some_targets(rng, 150, 333);
  std::vector<Tensor> results;
  for (const int threads : {1, 3}) {
    Context ctx({.threads = threads});
    const Tensor dx = Tensor::empty({150, 40});
    const Tensor dweight = Tensor::empty({333, 40});
    dweight.fill(0.5);
    run(ctx, linear_cross_entropy_backward,
        {.forward = {.x = x, .weight = weight, .targets = targets, .block = 64},
         .scale = 0.1,
         .dx = dx,
         .dweight = dweight});
    results.push_back(dx);
    results.push_back(dweight);
  }
  EXPECT_EQ(std::memcmp(results[0].raw(), results[2].raw(), results[0].nbytes()), 0);
  EXPECT_EQ(std::memcmp(results[1].raw(), results[3].raw(), results[1].nbytes()), 0);

  Context ctx;
  const Tensor logits = run(ctx, linear, {.x = x, .weight = weight});
  run(ctx, cross_entropy_backward, {.logits = logits, .targets = targets, .scale = 0.1, .dlogits = logits});
  const Tensor dx = Tensor::empty({150, 40});
  const Tensor dweight = Tensor::empty({333, 40});
  dweight.fill(0.5);
  run(ctx, linear_backward, {.x = x, .weight = weight, .dout = logits, .dx = dx, .dweight = dweight});
  expect_close(results[0], dx, 1e-5, 1e-6, "dx");
  expect_close(results[1], dweight, 1e-5, 1e-6, "dweight");
}

// A head in bf16: on a GPU dlogits are rounded to bf16 for the products, on the CPU as linear_backward has
// it.
TEST(CrossEntropyBackward, HeadInBf16) {
  Context ctx;
  Rng rng(5);
  for (const std::int64_t vocabulary : {320, 333}) {
    SCOPED_TRACE(vocabulary);
    const Tensor x = random_tensor(rng, {70, 48}, DType::bf16, -1, 1);
    const Tensor weight = random_tensor(rng, {vocabulary, 48}, DType::bf16, -1, 1);
    LinearCrossEntropyBackwardArgs args{
        .forward = {.x = x, .weight = weight, .targets = some_targets(rng, 70, vocabulary), .block = 32},
        .scale = 0.1,
        .dx = Tensor::empty(x.shape()),
        .dweight = Tensor::zeros(weight.shape())};
    const CrossEntropyResult found = run(ctx, linear_cross_entropy_backward, args);
    LinearCrossEntropyBackwardArgs exact = args;
    exact.forward.x = x.to(DType::f64);
    exact.forward.weight = weight.to(DType::f64);
    exact.dx = Tensor::empty(x.shape(), DType::f64);
    exact.dweight = Tensor::zeros(weight.shape(), DType::f64);
    const CrossEntropyResult expected = linear_cross_entropy_backward(ctx, exact);
    EXPECT_NEAR(found.mean, expected.mean, 1e-5 * expected.mean);
    // Each term of a sum is off by 2^-9 of itself.
    expect_close(args.dx, exact.dx, 1e-2, 4e-3, "dx");
    expect_close(args.dweight, exact.dweight, 1e-2, 4e-3, "dweight");
  }
}

// What it throws is kept, so that tensors come back from a device all the same.
std::string thrown;
CrossEntropyResult throwing(Context& ctx, const LinearCrossEntropyBackwardArgs& args) {
  thrown = testing::message_of([&] { linear_cross_entropy_backward(ctx, args); });
  return {};
}

// Gradients that are added to are as they were where a target is not allowed: on a GPU too, where the host
// sees it at the end alone.
TEST(CrossEntropyBackward, ABadTargetLeavesGradientsAlone) {
  Context ctx;
  Rng rng(6);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor targets = some_targets(rng, 70, 33);
    targets.data<std::int64_t>()[68] = 33;
    const Tensor dweight = random_tensor(rng, {33, 48});
    const Tensor dbias = random_tensor(rng, {33});
    LinearCrossEntropyBackwardArgs args{.forward = {.x = random_tensor(rng, {70, 48}, dtype, -1, 1),
                                                    .weight = random_tensor(rng, {33, 48}, dtype, -1, 1),
                                                    .bias = random_tensor(rng, {33}),
                                                    .targets = targets,
                                                    .block = 32},
                                        .dx = Tensor::zeros({70, 48}),
                                        .dweight = dweight.clone(),
                                        .dbias = dbias.clone()};
    run(ctx, throwing, args);
    EXPECT_EQ(thrown,
              "[linear_cross_entropy_backward] target 33 at position 68 is outside [0, 33) and not "
              "ignore_index (-100)");
    testing::expect_same_bits(args.dweight, dweight, "dweight");
    testing::expect_same_bits(args.dbias, dbias, "dbias");
  }
}

TEST(CrossEntropyBackward, NamesWhatDoesNotFit) {
  Context ctx;
  EXPECT_THROW(cross_entropy_backward(ctx, {.logits = Tensor::zeros({2, 3}),
                                            .targets = Tensor::zeros({2}, DType::i64),
                                            .dlogits = Tensor::zeros({2, 4})}),
               Error);
  EXPECT_THROW(linear_cross_entropy_backward(ctx, {.forward = {.x = Tensor::zeros({2, 3}),
                                                               .weight = Tensor::zeros({5, 3}),
                                                               .targets = Tensor::zeros({2}, DType::i64)},
                                                   .dweight = Tensor::zeros({3, 5})}),
               Error);
}

}  // namespace
}  // namespace krait
