#include "krait/ops/rotary.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <vector>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "ops/finite_difference.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;

// The path under test: on a GPU there is one.
RotaryPath fast_path() { return on_gpu() ? RotaryPath::automatic : RotaryPath::simd; }

TEST(Rotary, DefinitionByHand) {
  Context ctx;
  const double low = 3.0 * 0.1;  // position 3, the second of two pairs, base 100
  const std::array<float, 4> sine{std::sin(3.0F), std::sin(static_cast<float>(low))};
  const std::array<float, 4> cosine{std::cos(3.0F), std::cos(static_cast<float>(low))};
  for (const RotaryPath path : {RotaryPath::reference, fast_path()}) {
    const Tensor positions = Tensor::from<std::int64_t>({3});
    const Tensor halves = Tensor::from<float>({1.0F, 2.0F, 3.0F, 4.0F, 9.0F}, {1, 1, 5});
    run(ctx, rotary_embedding, {.x = halves, .positions = positions, .dim = 4, .base = 100.0, .path = path});
    expect_close(
        halves,
        Tensor::from<float>({1.0F * cosine[0] - 3.0F * sine[0], 2.0F * cosine[1] - 4.0F * sine[1],
                             1.0F * sine[0] + 3.0F * cosine[0], 2.0F * sine[1] + 4.0F * cosine[1], 9.0F},
                            {1, 1, 5}),
        1e-6, "halves");
    const Tensor pairs = Tensor::from<float>({1.0F, 2.0F, 3.0F, 4.0F, 9.0F}, {1, 1, 5});
    run(ctx, rotary_embedding,
        {.x = pairs, .positions = positions, .dim = 4, .base = 100.0, .interleaved = true, .path = path});
    expect_close(
        pairs,
        Tensor::from<float>({1.0F * cosine[0] - 2.0F * sine[0], 1.0F * sine[0] + 2.0F * cosine[0],
                             3.0F * cosine[1] - 4.0F * sine[1], 3.0F * sine[1] + 4.0F * cosine[1], 9.0F},
                            {1, 1, 5}),
        1e-6, "interleaved");
  }
}

TEST(Rotary, SimdMatchesTheReference) {
  on_each_target([] {
    Rng rng(3);
    Context ctx(ContextOptions{.threads = 2});
    for (int trial = 0; trial < 80; ++trial) {
      const DType dtype = random_dtype(rng);
      const std::int64_t head_dim = pick(rng, 1, 70);
      const Dims shape{pick(rng, 1, 6), pick(rng, 1, 4), head_dim};
      const int layout = static_cast<int>(pick(rng, 0, 3));
      std::vector<std::int64_t> positions;
      for (std::int64_t t = 0; t < shape[0]; ++t)
        positions.push_back(pick(rng, 0, coin(rng) ? 100 : 4'000'000'000));
      const std::int64_t dim = coin(rng) ? head_dim / 2 * 2 : pick(rng, 0, head_dim / 2) * 2;
      RotaryArgs args{.x = random_tensor(rng, shape, dtype, -2.0, 2.0, layout),
                      .positions = Tensor::from(positions),
                      .dim = dim,
                      .base = coin(rng) ? 10000.0 : 500000.0,
                      .interleaved = coin(rng),
                      .inverse = coin(rng)};
      SCOPED_TRACE(concat("trial ", trial, " shape ", shape, " dim ", dim, " dtype ", dtype, " layout ",
                          layout, " interleaved ", args.interleaved));
      RotaryArgs exact = args;
      exact.x = args.x.to(DType::f64).clone();
      run(ctx, rotary_embedding, exact);
      args.path = fast_path();
      run(ctx, rotary_embedding, args);
      expect_close(args.x, exact.x, 1e-6 + rounding_of(dtype), "x");
      if (::testing::Test::HasFailure()) return;
    }
  });
}

// In f32 the angle of position 1e6 would be wrong by 0.03 radians.
TEST(Rotary, FarPositions) {
  Context ctx;
  for (const std::int32_t position : {1'000'000, 16'777'217, -999'983}) {
    const Tensor x = Tensor::from<float>({1.0F, 0.0F}, {1, 1, 2});
    run(ctx, rotary_embedding, {.x = x, .positions = Tensor::from<std::int32_t>({position}), .dim = 2});
    EXPECT_NEAR(x.data<float>()[0], std::cos(static_cast<double>(position)), 3e-7) << position;
    EXPECT_NEAR(x.data<float>()[1], std::sin(static_cast<double>(position)), 3e-7) << position;
  }
}

TEST(Rotary, InverseTurnsBack) {
  Rng rng(4);
  Context ctx;
  const Tensor x = random_tensor(rng, {5, 2, 24});
  const Tensor before = x.clone();
  const Tensor positions = Tensor::from<std::int64_t>({0, 1, 77, 4096, 123456});
  for (const bool interleaved : {false, true}) {
    RotaryArgs args{.x = x, .positions = positions, .dim = 16, .interleaved = interleaved};
    run(ctx, rotary_embedding, args);
    args.inverse = true;
    run(ctx, rotary_embedding, args);
    expect_close(x, before, 1e-6, "x");
  }
}

// Turning a gradient backwards is the gradient of turning.
TEST(Rotary, InverseIsTheGradient) {
  Rng rng(5);
  Context ctx;
  const Tensor positions = Tensor::from<std::int64_t>({0, 2, 1'000'003});
  for (const bool interleaved : {false, true})
    for (const bool inverse : {false, true})
      for (const std::int64_t dim : {0, 4, 6}) {
        SCOPED_TRACE(concat("interleaved ", interleaved, " inverse ", inverse, " dim ", dim));
        const Tensor x = random_tensor(rng, {3, 2, 7}, DType::f64);
        const Tensor dout = random_tensor(rng, {3, 2, 7}, DType::f64);
        RotaryArgs args{.positions = positions, .dim = dim, .interleaved = interleaved, .inverse = inverse};
        const auto loss = [&] {
          args.x = x.clone();
          run(ctx, rotary_embedding, args);
          return test::weighted_sum(args.x, dout);
        };
        RotaryArgs backward = args;
        backward.x = dout.clone();
        backward.inverse = !inverse;
        run(ctx, rotary_embedding, backward);
        test::expect_gradient(loss, x, backward.x, "dx");
      }
}

// The product of a turned query and a turned key depends on the distance of their positions alone.
TEST(Rotary, ProductsDependOnDistance) {
  Rng rng(9);
  Context ctx;
  const Tensor q = random_tensor(rng, {1, 1, 32});
  const Tensor k = random_tensor(rng, {1, 1, 32});
  const auto product = [&](std::int64_t at_q, std::int64_t at_k) {
    const Tensor a = q.clone();
    const Tensor b = k.clone();
    run(ctx, rotary_embedding, {.x = a, .positions = Tensor::from<std::int64_t>({at_q}), .dim = 32});
    run(ctx, rotary_embedding, {.x = b, .positions = Tensor::from<std::int64_t>({at_k}), .dim = 32});
    double sum = 0.0;
    for (int i = 0; i < 32; ++i) sum += static_cast<double>(a.data<float>()[i] * b.data<float>()[i]);
    return sum;
  };
  EXPECT_NEAR(product(17, 5), product(1'000'012, 1'000'000), 1e-5);
  EXPECT_GT(std::abs(product(17, 5) - product(17, 6)), 1e-3);
}

TEST(Rotary, ThreadsDoNotChangeBits) {
  Rng rng(8);
  const Tensor x = random_tensor(rng, {300, 5, 64});
  std::vector<std::int64_t> positions(300);
  for (std::size_t i = 0; i < 300; ++i) positions[i] = static_cast<std::int64_t>(i);
  Tensor first;
  for (const int threads : {1, 2, 5}) {
    Context ctx(ContextOptions{.threads = threads});
    const Tensor turned = x.clone();
    run(ctx, rotary_embedding, {.x = turned, .positions = Tensor::from(positions), .dim = 64});
    if (!first) first = turned;
    expect_same_bits(turned, first, concat(threads, " threads"));
  }
}

TEST(Rotary, EmptyShapes) {
  Context ctx;
  for (const RotaryPath path : {RotaryPath::reference, fast_path()}) {
    run(ctx, rotary_embedding,
        {.x = Tensor::zeros({0, 2, 4}), .positions = Tensor::zeros({0}, DType::i64), .dim = 4, .path = path});
    run(ctx, rotary_embedding,
        {.x = Tensor::zeros({2, 0, 4}), .positions = Tensor::zeros({2}, DType::i64), .dim = 4, .path = path});
    run(ctx, rotary_embedding,
        {.x = Tensor::zeros({2, 2, 0}), .positions = Tensor::zeros({2}, DType::i64), .path = path});
  }
}

TEST(Rotary, NamesWhatIsWrong) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 1, 8});
  const Tensor positions = Tensor::zeros({2}, DType::i64);
  EXPECT_EQ(message_of([&] {
              rotary_embedding(ctx, {.x = Tensor::zeros({2, 8}), .positions = positions});
            }),
            "[rotary] x has shape (2, 8), expected (T, H, head_dim)");
  EXPECT_EQ(message_of([&] { rotary_embedding(ctx, {.x = x, .positions = Tensor::zeros({3}, DType::i64)}); }),
            "[rotary] positions has shape (3,), expected (2,): one for each token");
  EXPECT_EQ(message_of([&] { rotary_embedding(ctx, {.x = x, .positions = Tensor::zeros({2})}); }),
            "[rotary] positions has dtype f32, expected i64 or i32");
  for (const std::int64_t dim : {7, 10, -2})
    EXPECT_EQ(message_of([&] { rotary_embedding(ctx, {.x = x, .positions = positions, .dim = dim}); }),
              concat("[rotary] dim is ", dim, ", expected an even number up to head_dim 8"));
  EXPECT_EQ(
      message_of([&] { rotary_embedding(ctx, {.x = x, .positions = positions, .dim = 2, .base = 0.0}); }),
      "[rotary] base is 0, expected a positive number");
  EXPECT_EQ(
      message_of([&] {
        rotary_embedding(ctx, {.x = x, .positions = Tensor::from<std::int64_t>({0, 4294967296}), .dim = 2});
      }),
      "[rotary] position 1 is 4294967296, expected a magnitude below 2^32");
}

}  // namespace
}  // namespace krait
