#include <gtest/gtest.h>

#include <cstring>

#include "core/on_device.h"
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
  run(ctx, embedding_backward, {.ids = ids, .dout = dout, .dweight = dweight});
  test::expect_gradient(
      [&] {
        return test::weighted_sum(
            run(ctx, embedding, {.ids = ids, .weight = weight, .out_dtype = DType::f64}), dout);
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
      const auto sums = [&](int threads, DType sum) {
        Context ctx({.threads = threads});
        Tensor dweight = Tensor::empty({17, 77}, sum);
        dweight.fill(0.25);
        run(ctx, embedding_backward, {.ids = ids, .dout = dout, .dweight = dweight});
        return dweight;
      };
      const Tensor one = sums(1, DType::f32);
      const Tensor three = sums(3, DType::f32);
      EXPECT_EQ(std::memcmp(one.raw(), three.raw(), one.nbytes()), 0);
      expect_close(one, sums(1, DType::f64), 1e-5, 1e-6, "dweight");
    }
}

// Many positions of few ids and of many, over more than one tile of the sort and several digits.
TEST(EmbeddingBackward, ManyPositions) {
  Rng rng(3);
  Context ctx;
  for (const std::int64_t vocabulary : {1, 5, 300, 70000}) {
    SCOPED_TRACE(concat("vocabulary ", vocabulary));
    const std::int64_t count = 5000;
    Tensor ids = Tensor::empty({count}, DType::i32);
    for (auto& id : ids.span<std::int32_t>())
      id = static_cast<std::int32_t>(
          pick(rng, 0, coin(rng) ? vocabulary - 1 : std::min<std::int64_t>(3, vocabulary - 1)));
    const Tensor dout = random_tensor(rng, {count, 3});
    const Tensor dweight = Tensor::zeros({vocabulary, 3});
    run(ctx, embedding_backward, {.ids = ids, .dout = dout, .dweight = dweight});
    const Tensor expected = Tensor::zeros({vocabulary, 3});
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t c = 0; c < 3; ++c)
        expected.data<float>()[ids.data<std::int32_t>()[i] * 3 + c] += dout.data<float>()[i * 3 + c];
    expect_same_bits(dweight, expected, "dweight");
  }
}

TEST(EmbeddingBackward, TakesNothingAndNamesWhatDoesNotFit) {
  Context ctx;
  const Tensor dweight = Tensor::zeros({3, 2});
  run(ctx, embedding_backward,
      {.ids = Tensor::zeros({0}, DType::i64), .dout = Tensor::zeros({0, 2}), .dweight = dweight});
  const EmbeddingBackwardArgs outside{.ids = Tensor::from(std::vector<std::int64_t>{3, -1, 1}),
                                      .dout = Tensor::from<float>({1, 2, 3, 4, 5, 6}, {3, 2}),
                                      .dweight = dweight};
  if (on_gpu()) {
    run(ctx, embedding_backward, outside);  // ids that nobody has looked at add nothing
    expect_same_bits(dweight, Tensor::from<float>({0, 0, 5, 6, 0, 0}, {3, 2}));
  } else {
    EXPECT_THROW(embedding_backward(ctx, outside), Error);
  }
  EXPECT_THROW(
      run(ctx, embedding_backward,
          {.ids = Tensor::zeros({1}, DType::i64), .dout = Tensor::zeros({1, 3}), .dweight = dweight}),
      Error);
}

}  // namespace
}  // namespace krait
