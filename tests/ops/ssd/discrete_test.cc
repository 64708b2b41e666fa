// The discrete form of ssd and the way between the two forms.
#include <gtest/gtest.h>

#include <cmath>

#include "ops/ssd/ssd_cases.h"

namespace krait {
namespace {

using namespace testing;

struct DiscreteArgs {
  Tensor X, A, B, C, initial_states;
  std::int64_t block_len;
};
SsdResult minimal_discrete(Context& ctx, const DiscreteArgs& a) {
  const auto [Y, final_state] = ssd_minimal_discrete(ctx, a.X, a.A, a.B, a.C, a.block_len, a.initial_states);
  return {.out = Y, .final_states = final_state};
}

TEST(SsdMinimalDiscrete, EqualsSsd) {
  Rng rng(1);
  for (const DType dtype : {DType::f64, DType::f32}) {
    for (const std::int64_t length : {0, 1, 7, 64, 150}) {
      for (const std::int64_t block : {1, 8, 64}) {
        for (const bool start : {false, true}) {
          SCOPED_TRACE(concat(dtype, " L ", length, " block_len ", block, start ? " initial_states" : ""));
          Context ctx;
          // B and C of one group for each head, as Listing 1 has them.
          SsdArgs args = in_f64(plain_case(
              rng, {.rows = 2, .length = length, .heads = 3, .headdim = 5, .groups = 3, .d_state = 6}));
          if (start) args.initial_states = random_tensor(rng, {2, 3, 5, 6}, DType::f64);
          args.return_final_states = true;
          const SsdResult expected = ssd(ctx, args);
          const DiscreteSsm discrete = ssd_discretize(ctx, args.x, args.dt, args.A);
          const auto [Y, final_state, states] =
              run(ctx, minimal_discrete,
                  {.X = discrete.X.to(dtype),
                   .A = discrete.A.to(dtype),
                   .B = args.B.to(dtype),
                   .C = args.C.to(dtype),
                   .initial_states = start ? args.initial_states.unsqueeze(1).to(dtype) : Tensor(),
                   .block_len = block});
          const double tolerance = dtype == DType::f64 ? 1e-12 : 2e-5;
          EXPECT_EQ(Y.dtype(), dtype);
          expect_close(Y, expected.out, tolerance, "Y");
          expect_close(final_state, expected.final_states, tolerance, "final_state");
        }
      }
    }
  }
}

// A growing state is no concern of the continuous form (A < 0), but of the discrete one.
TEST(SsdMinimalDiscrete, ZeroAndPositiveExponents) {
  Context ctx;
  Rng rng(2);
  const Tensor X = random_tensor(rng, {1, 20, 1, 3});
  const Tensor B = random_tensor(rng, {1, 20, 1, 4});
  const Tensor C = random_tensor(rng, {1, 20, 1, 4});
  const Tensor A = random_tensor(rng, {1, 20, 1}, DType::f32, 0.0, 0.1);
  A.data<float>()[3] = 0.0F;
  const auto exact =
      ssd_minimal_discrete(ctx, X.to(DType::f64), A.to(DType::f64), B.to(DType::f64), C.to(DType::f64), 8);
  const SsdResult found = run(ctx, minimal_discrete, {.X = X, .A = A, .B = B, .C = C, .block_len = 8});
  expect_close(found.out, exact.first, 1e-5, "Y");
  expect_close(found.final_states, exact.second, 1e-5, "final_state");
}

TEST(SsdConversions, ThereAndBack) {
  Context ctx;
  Rng rng(3);
  const Tensor x = random_tensor(rng, {2, 5, 3, 4}, DType::f32, -1, 1, 1);
  const Tensor d = random_tensor(rng, {2, 5, 3}, DType::f32, 0.01, 2.0);
  const Tensor A = Tensor::from<float>({-1.0F, -2.0F, -0.5F});
  const DiscreteSsm discrete = ssd_discretize(ctx, x, d, A);
  EXPECT_FLOAT_EQ(discrete.A.data<float>()[4], d.data<float>()[4] * -2.0F);
  EXPECT_FLOAT_EQ(discrete.X.data<float>()[4 * 4], d.data<float>()[4] * x.clone().data<float>()[4 * 4]);
  const DiscreteSsm back = ssd_undiscretize(ctx, discrete.X, discrete.A, d);
  expect_close(back.X, x, 1e-6, "x");
  expect_close(back.A, A.unsqueeze(0).unsqueeze(0).expand({2, 5, 3}), 1e-6, "A");
}

TEST(SsdConversions, MessagesNameWhatWasFound) {
  Context ctx;
  const Tensor X = Tensor::zeros({2, 5, 3, 4});
  const Tensor d = Tensor::zeros({2, 5, 3});
  d.fill(1.0);
  d.data<float>()[(5 + 2) * 3 + 1] = 0.0F;
  EXPECT_EQ(message_of([&] { (void)ssd_undiscretize(ctx, X, d, d); }),
            "[ssd_undiscretize] d is 0 for head 1 of token 2 of row 1: x and A cannot be recovered");
  EXPECT_EQ(message_of([&] { (void)ssd_discretize(ctx, X, d, d); }),
            "[ssd_discretize] A has shape (2, 5, 3), expected (3,)");
  const Tensor B = Tensor::zeros({2, 5, 3, 6});
  EXPECT_EQ(message_of([&] { (void)ssd_minimal_discrete(ctx, X, d, B, B, 0); }),
            "[ssd_minimal_discrete] block_len is 0, expected 1 or more");
  EXPECT_EQ(message_of([&] {
              (void)ssd_minimal_discrete(ctx, X, d, B, B, 8, Tensor::zeros({2, 3, 4, 6}));
            }),
            "[ssd_minimal_discrete] initial_states has shape (2, 3, 4, 6), expected (2, 1, 3, 4, 6)");
  EXPECT_EQ(message_of([&] {
              (void)ssd_minimal_discrete(ctx, X, d, B, Tensor::zeros({2, 5, 3, 7}), 8);
            }),
            "[ssd_minimal_discrete] C has shape (2, 5, 3, 7), expected (2, 5, 3, 6)");
}

}  // namespace
}  // namespace krait
