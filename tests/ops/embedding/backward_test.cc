#include <gtest/gtest.h>

#include <cstring>

#include "krait/core/error.h"
#include "krait/ops/embedding.h"
#include "ops/finite_difference.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;

TEST(EmbeddingBackward, IsTheDerivative) {
  Context ctx;
  Rng rng(1);
  const Tensor ids = Tensor::from(std::vector<std::int64_t>{3, 0, 3, 1, 3, 4}, {2, 3});
  const Tensor weight = random_tensor(rng, {5, 4}, DType::f64, -1, 1);
  const Tensor dout = random_tensor(rng, {2, 3, 4}, DType::f64, -1, 1);
  const Tensor dweight = Tensor::zeros({5, 4}, DType::f64);
  embedding_backward(ctx, {.ids = ids, .dout = dout, .dweight = dweight});
  test::expect_gradient(
      [&] {
        return test::weighted_sum(embedding(ctx, {.ids = ids, .weight = weight, .out_dtype = DType::f64}),
                                  dout);
      },
      weight, dweight, "dweight");
}

TEST(EmbeddingBackward, EveryDtypeStrideAndThreadCountAgrees) {
  Rng rng(2);
  Tensor ids = Tensor::empty({500}, DType::i64);
  for (auto& id : ids.span<std::int64_t>()) id = rng.next_u32() % 17;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const int layout : {0, kScattered}) {
      SCOPED_TRACE(concat(dtype, layout == kScattered ? " scattered" : ""));
      const Tensor dout = random_tensor(rng, {500, 77}, dtype, -1, 1, layout);
      const auto run = [&](int threads, DType sum) {
        Context ctx({.threads = threads});
        Tensor dweight = Tensor::empty({17, 77}, sum);
        dweight.fill(0.25);
        embedding_backward(ctx, {.ids = ids, .dout = dout, .dweight = dweight});
        return dweight;
      };
      const Tensor one = run(1, DType::f32);
      const Tensor three = run(3, DType::f32);
      EXPECT_EQ(std::memcmp(one.raw(), three.raw(), one.nbytes()), 0);
      expect_close(one, run(1, DType::f64), 1e-5, 1e-6, "dweight");
    }
}

TEST(EmbeddingBackward, TakesNothingAndNamesWhatDoesNotFit) {
  Context ctx;
  const Tensor dweight = Tensor::zeros({3, 2});
  embedding_backward(
      ctx, {.ids = Tensor::zeros({0}, DType::i64), .dout = Tensor::zeros({0, 2}), .dweight = dweight});
  EXPECT_THROW(embedding_backward(ctx, {.ids = Tensor::from(std::vector<std::int64_t>{3}),
                                        .dout = Tensor::zeros({1, 2}),
                                        .dweight = dweight}),
               Error);
  EXPECT_THROW(
      embedding_backward(
          ctx, {.ids = Tensor::zeros({1}, DType::i64), .dout = Tensor::zeros({1, 3}), .dweight = dweight}),
      Error);
}

}  // namespace
}  // namespace krait
