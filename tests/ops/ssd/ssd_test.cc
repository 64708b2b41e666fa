// The numbers of ssd: the reference against the definition, the fast paths against the reference.
#include <gtest/gtest.h>

#include <cmath>

#include "ops/ssd/ssd_cases.h"

namespace krait {
namespace {

using namespace testing;

// y_i = sum_{j <= i} (C_i . B_j) exp(sum of d A over (j, i]) d_j x_j + exp(sum over [0, i]) S_0 C_i: the
// matrix that the recurrence is equal to, without a recurrence.
TEST(Ssd, ReferenceIsTheMatrixForm) {
  Context ctx;
  Rng rng(1);
  const SsdSizes s{.rows = 2, .length = 9, .heads = 4, .headdim = 3, .groups = 2, .d_state = 5};
  SsdArgs args = in_f64(plain_case(rng, s));
  args.initial_states = random_tensor(rng, {2, 4, 3, 5}, DType::f64);
  args.return_final_states = true;
  args.D = random_tensor(rng, {4, 3}, DType::f64);
  args.z = random_tensor(rng, args.x.shape(), DType::f64);
  args.dt_bias = random_tensor(rng, {4}, DType::f64);
  args.dt_softplus = true;
  args.dt_limit = {0.6F, 0.9F};
  const SsdResult result = run(ctx, ssd, args);

  const Tensor out = Tensor::zeros(args.x.shape(), DType::f64);
  const auto at = [](const Tensor& t, std::initializer_list<std::int64_t> index) -> double& {
    std::int64_t offset = 0;
    int dim = 0;
    for (const std::int64_t i : index) offset += i * t.stride(dim++);
    return t.data<double>()[offset];
  };
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t h = 0; h < 4; ++h) {
      const auto step = [&](std::int64_t t) {
        const double d = std::log1p(std::exp(at(args.dt, {b, t, h}) + at(args.dt_bias, {h})));
        return std::min(std::max(d, static_cast<double>(0.6F)), static_cast<double>(0.9F));
      };
      for (std::int64_t i = 0; i < 9; ++i) {
        for (std::int64_t p = 0; p < 3; ++p) {
          double y = at(args.D, {h, p}) * at(args.x, {b, i, h, p});
          double exponent = 0.0;
          for (std::int64_t j = i; j >= 0; --j) {
            double cb = 0.0;
            for (std::int64_t n = 0; n < 5; ++n)
              cb += at(args.C, {b, i, h / 2, n}) * at(args.B, {b, j, h / 2, n});
            y += cb * std::exp(exponent) * step(j) * at(args.x, {b, j, h, p});
            exponent += step(j) * at(args.A, {h});
          }
          for (std::int64_t n = 0; n < 5; ++n)
            y += std::exp(exponent) * at(args.initial_states, {b, h, p, n}) * at(args.C, {b, i, h / 2, n});
          const double z = at(args.z, {b, i, h, p});
          at(out, {b, i, h, p}) = y * z / (1.0 + std::exp(-z));
        }
      }
    }
  }
  expect_close(result.out, out, 1e-12, "out");
}

TEST(Ssd, FastPathsOverSizesAndLayouts) {
  Rng rng(2);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const std::int64_t length : {0, 1, 2, 5, 17, 65, 130}) {
      for (const std::int64_t headdim : {0, 1, 7, 16, 33}) {
        for (const std::int64_t d_state : {0, 1, 6, 16, 35}) {
          const int layout = static_cast<int>(pick(rng, 0, 3));
          SCOPED_TRACE(concat("L ", length, " P ", headdim, " N ", d_state, " ", dtype, " layout ", layout));
          SsdArgs args = plain_case(
              rng,
              {.rows = 2, .length = length, .heads = 4, .headdim = headdim, .groups = 2, .d_state = d_state},
              dtype, layout);
          args.return_final_states = true;
          expect_fast(args);
        }
      }
    }
  }
}

TEST(Ssd, FastPathsOverRandomOptions) {
  Rng rng(3);
  for (int i = 0; i < 600; ++i) {
    std::string name;
    const SsdArgs args = random_case(rng, name);
    SCOPED_TRACE(concat("case ", i, ": ", name));
    expect_fast(args);
    if (HasFailure()) return;
  }
}

TEST(Ssd, EachOptionAlone) {
  Rng rng(4);
  const SsdArgs plain = plain_case(rng, kOptionSizes);
  const auto check = [&](const char* option, const auto& set) {
    SCOPED_TRACE(option);
    SsdArgs args = plain;
    set(args);
    expect_fast(args);
  };
  check_each_option(rng, check);
  check("final_states", [&](SsdArgs& a) { a.return_final_states = true; });
  check("state_positions", [&](SsdArgs& a) {
    a.state_positions = Tensor::from<std::int64_t>({0, 69, 33, 33, 5, 64}, {2, 3});
  });
}

TEST(Ssd, EachSimdTarget) {
  if (on_gpu()) GTEST_SKIP();
  on_each_target([] {
    Rng rng(5);
    for (int i = 0; i < 60; ++i) {
      std::string name;
      const SsdArgs args = random_case(rng, name);
      SCOPED_TRACE(concat("case ", i, ": ", name));
      expect_fast(args);
    }
  });
}

TEST(Ssd, ModelShape) {
  Rng rng(6);
  SsdArgs args =
      plain_case(rng, {.rows = 1, .length = 150, .heads = 3, .headdim = 64, .groups = 1, .d_state = 128});
  args.initial_states = random_tensor(rng, {1, 3, 64, 128});
  args.return_final_states = true;
  expect_fast(args);
}

TEST(Ssd, TensorCoreShapes) {
  Rng rng(11);
  for (int i = 0; i < 90; ++i) {
    std::string name;
    const SsdArgs args = tensor_core_case(rng, i, name);
    SCOPED_TRACE(concat("case ", i, ": ", name));
    // A state of few terms has the rounding of each in full.
    expect_fast(args, 2.0 * rounding_of(args.x.dtype()));
    Context ctx;
    expect_same_bits(run(ctx, ssd, args).out, run(ctx, ssd, args).out, "out of a second run");
    if (HasFailure()) return;
  }
}

TEST(Ssd, ChunkSizesAgree) {
  Context ctx;
  Rng rng(7);
  SsdArgs args =
      plain_case(rng, {.rows = 1, .length = 300, .heads = 4, .headdim = 16, .groups = 2, .d_state = 16});
  args.A.fill(-0.01);  // long memory: what is carried over chunks matters
  args.return_final_states = true;
  const SsdResult exact = run(ctx, ssd, in_f64(args));
  args.path = chunked_path();
  for (const std::int64_t chunk : {1, 7, 16, 64, 256, 100000}) {
    SCOPED_TRACE(concat("chunk ", chunk));
    args.chunk_size = chunk;
    const SsdResult found = run(ctx, ssd, args);
    expect_close(found.out, exact.out, 2e-5, "out");
    expect_close(found.final_states, exact.final_states, 2e-5, "final_states");
  }
}

// Exponents whose sums are large: their differences must keep their digits.
TEST(Ssd, LargeExponentSumsKeepPrecision) {
  Context ctx;
  Rng rng(8);
  SsdArgs args =
      plain_case(rng, {.rows = 1, .length = 256, .heads = 2, .headdim = 8, .groups = 1, .d_state = 8});
  args.A = Tensor::from<float>({-12.0F, -30.0F});
  args.dt = random_tensor(rng, {1, 256, 2}, DType::f32, 0.0, 0.01);
  // A few steps of strong decay among weak ones.
  for (std::int64_t t = 0; t < 256; t += 5) args.dt.data<float>()[t * 2] = 9.0F;
  args.chunk_size = 256;
  const SsdResult exact = run(ctx, ssd, in_f64(args));
  for (const SsdPath path : fast_paths()) {
    args.path = path;
    expect_close(run(ctx, ssd, args).out, exact.out, 3e-6,
                 path == SsdPath::chunked ? "chunked" : "recurrent");
  }
}

TEST(Ssd, UnderflowAndHugeStepsGiveNoNan) {
  Context ctx;
  Rng rng(9);
  for (const float rate : {-1e4F, -1e30F, -std::numeric_limits<float>::max()}) {
    for (const double step : {1.0, 1e10, 1e30}) {
      SsdArgs args =
          plain_case(rng, {.rows = 1, .length = 20, .heads = 2, .headdim = 5, .groups = 1, .d_state = 5});
      args.A.fill(static_cast<double>(rate));
      args.dt.fill(step);
      args.initial_states = random_tensor(rng, {1, 2, 5, 5});
      args.return_final_states = true;
      args.chunk_size = 8;
      // Each token forgets all others; what is left is as large as its step.
      const SsdResult exact = run(ctx, ssd, in_f64(args));
      const auto by_step = [&](const Tensor& t) {
        const Tensor wide = t.to(DType::f64).clone();
        for (double& value : wide.span<double>()) value /= step;
        return wide;
      };
      for (const SsdPath path : fast_paths()) {
        SCOPED_TRACE(concat("A ", rate, " dt ", step, " path ", static_cast<int>(path)));
        args.path = path;
        const SsdResult found = run(ctx, ssd, args);
        expect_close(by_step(found.out), by_step(exact.out), 1e-6, "out / dt");
        expect_close(by_step(found.final_states), by_step(exact.final_states), 1e-6, "final_states / dt");
      }
    }
  }
}

TEST(Ssd, NanStaysInItsHeadAndIsNotHidden) {
  Context ctx;
  Rng rng(10);
  for (const SsdPath path : all_paths()) {
    SCOPED_TRACE(static_cast<int>(path));
    SsdArgs args =
        plain_case(rng, {.rows = 1, .length = 12, .heads = 2, .headdim = 3, .groups = 1, .d_state = 4});
    args.dt_softplus = true;
    args.path = path;
    args.dt.data<float>()[5 * 2] = std::numeric_limits<float>::quiet_NaN();
    const Tensor out = run(ctx, ssd, args).out;
    for (std::int64_t t = 0; t < 12; ++t) {
      EXPECT_EQ(std::isnan(out.data<float>()[t * 6]), t >= 5) << "head 0, token " << t;
      EXPECT_FALSE(std::isnan(out.data<float>()[t * 6 + 3])) << "head 1, token " << t;
    }
  }
}

}  // namespace
}  // namespace krait
