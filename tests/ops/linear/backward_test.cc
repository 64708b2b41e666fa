#include <gtest/gtest.h>

#include <cstring>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/ops/linear.h"
#include "ops/finite_difference.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;
using test::expect_gradient;
using test::weighted_sum;

TEST(LinearBackward, ReferenceIsTheDerivative) {
  Context ctx;
  Rng rng(1);
  const Tensor x = random_tensor(rng, {2, 3, 5}, DType::f64, -1, 1);
  const Tensor weight = random_tensor(rng, {4, 5}, DType::f64, -1, 1);
  const Tensor bias = random_tensor(rng, {4}, DType::f64, -1, 1);
  const Tensor dout = random_tensor(rng, {2, 3, 4}, DType::f64, -1, 1);
  const Tensor dx = Tensor::empty(x.shape(), DType::f64);
  const Tensor dweight = Tensor::zeros(weight.shape(), DType::f64);
  const Tensor dbias = Tensor::zeros(bias.shape(), DType::f64);
  linear_backward(ctx,
                  {.x = x, .weight = weight, .dout = dout, .dx = dx, .dweight = dweight, .dbias = dbias});
  const auto loss = [&] { return weighted_sum(linear(ctx, {.x = x, .weight = weight, .bias = bias}), dout); };
  expect_gradient(loss, x, dx, "dx");
  expect_gradient(loss, weight, dweight, "dweight");
  expect_gradient(loss, bias, dbias, "dbias");
}

struct Case {
  std::int64_t rows;
  std::int64_t in;
  std::int64_t out;
};

constexpr Case kCases[] = {{1, 1, 1},   {0, 7, 5},    {3, 0, 5},     {3, 7, 0},     {1, 300, 40},
                           {5, 17, 31}, {70, 33, 65}, {129, 96, 17}, {67, 256, 300}};

// Every path against the reference in f64, with gradients that start from something and operands in any
// order.
TEST(LinearBackward, PathsAgreeWithTheReference) {
  const std::vector<LinearPath> paths =
      testing::on_gpu()
          ? std::vector{LinearPath::automatic, LinearPath::plain}
          : std::vector{LinearPath::automatic, LinearPath::reference, LinearPath::gemm, LinearPath::onednn};
  for (const LinearPath path : paths)
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (const Case& c : kCases)
        for (const int layout : {0, kScattered}) {
          if (path == LinearPath::onednn &&
              (layout == kScattered || onednn_products() == OnednnProducts::none))
            continue;
          if (path == LinearPath::onednn && dtype != DType::f32 &&
              !(dtype == DType::bf16 && onednn_products() == OnednnProducts::f32_and_bf16))
            continue;
          SCOPED_TRACE(concat("path ", static_cast<int>(path), " ", dtype, " ", c.rows, " x ", c.in, " x ",
                              c.out, layout == kScattered ? " scattered" : ""));
          Context ctx;
          Rng rng(3);
          const Tensor x = random_tensor(rng, {c.rows, c.in}, dtype, -1, 1, layout);
          const Tensor weight = random_tensor(rng, {c.out, c.in}, dtype, -1, 1, layout);
          const Tensor dout = random_tensor(rng, {c.rows, c.out}, dtype, -1, 1, layout);
          const auto run = [&](DType sum, LinearPath way, bool accumulate) {
            Rng start(5);
            const auto value = [&](const Tensor& t) { return sum == DType::f64 ? t.to(DType::f64) : t; };
            LinearBackwardArgs args{.x = value(x),
                                    .weight = value(weight),
                                    .dout = value(dout),
                                    .dx = random_tensor(start, {c.rows, c.in}, DType::f64, -1, 1).to(sum),
                                    .accumulate_dx = accumulate,
                                    .dweight = random_tensor(start, {c.out, c.in}, DType::f64, -1, 1).to(sum),
                                    .dbias = random_tensor(start, {c.out}, DType::f64, -1, 1).to(sum),
                                    .path = way};
            testing::run(ctx, linear_backward, args);
            return args;
          };
          for (const bool accumulate : {false, true}) {
            const LinearBackwardArgs found = run(DType::f32, path, accumulate);
            const LinearBackwardArgs want = run(DType::f64, LinearPath::reference, accumulate);
            // Tensor cores cut the sums of 16-bit products where f32 arithmetic would round them.
            const double tolerance = path == LinearPath::onednn && dtype == DType::bf16 ? 2e-2
                                     : testing::on_gpu() && dtype != DType::f32         ? 1e-5
                                                                                        : 2e-6;
            expect_close(found.dx, want.dx, tolerance, tolerance, "dx");
            expect_close(found.dweight, want.dweight, tolerance, tolerance, "dweight");
            expect_close(found.dbias, want.dbias, tolerance, tolerance, "dbias");
          }
        }
}

// Sizes at which cuBLASLt divides sums among blocks: two runs are equal. Factors of two dtypes are rounded to
// that of the weight, sums are not.
TEST(LinearBackward, ManyRowsAndMixedDtypes) {
  Rng rng(4);
  const Tensor x = random_tensor(rng, {3000, 96}, DType::bf16, -1, 1);
  const Tensor weight = random_tensor(rng, {80, 96}, DType::bf16, -1, 1);
  const Tensor dout = random_tensor(rng, {3000, 80}, DType::bf16, -1, 1);
  const auto run = [&](bool wide) {
    Context ctx;
    LinearBackwardArgs args{.x = wide ? x.to(DType::f32) : x,
                            .weight = weight,
                            .dout = wide ? dout.to(DType::f32) : dout,
                            .dx = Tensor::empty({3000, 96}),
                            .dweight = Tensor::zeros({80, 96}),
                            .dbias = Tensor::zeros({80})};
    testing::run(ctx, linear_backward, args);
    return args;
  };
  const LinearBackwardArgs first = run(false);
  Context ctx;
  LinearBackwardArgs exact{.x = x.to(DType::f64),
                           .weight = weight.to(DType::f64),
                           .dout = dout.to(DType::f64),
                           .dx = Tensor::empty({3000, 96}, DType::f64),
                           .dweight = Tensor::zeros({80, 96}, DType::f64),
                           .dbias = Tensor::zeros({80}, DType::f64)};
  linear_backward(ctx, exact);
  expect_close(first.dx, exact.dx, 1e-5, 1e-5, "dx");
  expect_close(first.dweight, exact.dweight, 1e-5, 1e-5, "dweight");
  expect_close(first.dbias, exact.dbias, 1e-5, 1e-5, "dbias");
  for (const LinearBackwardArgs& again : {run(false), run(true)}) {
    EXPECT_EQ(std::memcmp(first.dx.raw(), again.dx.raw(), first.dx.nbytes()), 0);
    EXPECT_EQ(std::memcmp(first.dweight.raw(), again.dweight.raw(), first.dweight.nbytes()), 0);
    EXPECT_EQ(std::memcmp(first.dbias.raw(), again.dbias.raw(), first.dbias.nbytes()), 0);
  }
}

TEST(LinearBackward, ThreadsChangeNoBit) {
  Rng rng(2);
  const Tensor x = random_tensor(rng, {300, 130}, DType::f32, -1, 1);
  const Tensor weight = random_tensor(rng, {270, 130}, DType::f32, -1, 1);
  const Tensor dout = random_tensor(rng, {300, 270}, DType::f32, -1, 1);
  std::vector<LinearBackwardArgs> results;
  for (const int threads : {1, 2, 3}) {
    Context ctx({.threads = threads});
    results.push_back({.x = x,
                       .weight = weight,
                       .dout = dout,
                       .dx = Tensor::empty({300, 130}),
                       .dweight = Tensor::zeros({270, 130}),
                       .dbias = Tensor::zeros({270})});
    testing::run(ctx, linear_backward, results.back());
  }
  for (const auto& other : {results[1], results[2]}) {
    EXPECT_EQ(std::memcmp(results[0].dx.raw(), other.dx.raw(), other.dx.nbytes()), 0);
    EXPECT_EQ(std::memcmp(results[0].dweight.raw(), other.dweight.raw(), other.dweight.nbytes()), 0);
    EXPECT_EQ(std::memcmp(results[0].dbias.raw(), other.dbias.raw(), other.dbias.nbytes()), 0);
  }
}

TEST(LinearBackward, NamesWhatDoesNotFit) {
  Context ctx;
  const Tensor dout = Tensor::zeros({2, 3});
  EXPECT_THROW(linear_backward(ctx, {.dout = dout, .dx = Tensor::zeros({2, 4})}), Error);
  EXPECT_THROW(linear_backward(ctx, {.dout = dout, .dweight = Tensor::zeros({3, 4})}), Error);
  try {
    linear_backward(ctx, {.x = Tensor::zeros({2, 4}), .dout = dout, .dweight = Tensor::zeros({4, 3})});
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "[linear_backward] dweight has shape (4, 3), expected (3, 4)");
  }
}

}  // namespace
}  // namespace krait
