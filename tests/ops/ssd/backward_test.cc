// The numbers of ssd_backward: the reference against finite differences, the chunked path against the
// reference.
#include <gtest/gtest.h>

#include <cmath>

#include "ops/finite_difference.h"
#include "ops/ssd/backward_cases.h"

namespace krait {
namespace {

using namespace testing;

// Every gradient of sum(out dout) + sum(final_states dfinal_states).
void expect_gradients(Rng& rng, SsdArgs f) {
  Context ctx;
  f = in_f64(f);
  if (!f.initial_states) f.initial_states = Tensor::zeros(state_shape(f), DType::f64);
  f.return_final_states = true;
  SsdBackwardArgs args = backward_case(rng, f);
  for (Tensor* t : {&args.dA, &args.dD, &args.ddt_bias})
    if (*t) t->fill(0.0);
  run(ctx, ssd_backward, args);
  const auto loss = [&] {
    const SsdResult result = run(ctx, ssd, f);
    return test::weighted_sum(result.out, args.dout) +
           test::weighted_sum(result.final_states, args.dfinal_states);
  };
  const std::vector<std::pair<Tensor, NamedGradient>> pairs = {
      {f.x, gradients_of_ssd()[0]}, {f.dt, gradients_of_ssd()[1]}, {f.B, gradients_of_ssd()[2]},
      {f.C, gradients_of_ssd()[3]}, {f.z, gradients_of_ssd()[4]},  {f.initial_states, gradients_of_ssd()[5]},
      {f.A, gradients_of_ssd()[6]}, {f.D, gradients_of_ssd()[7]},  {f.dt_bias, gradients_of_ssd()[8]},
  };
  for (const auto& [input, gradient] : pairs)
    if (input) test::expect_gradient(loss, input, args.*gradient.tensor, gradient.name);
}

TEST(SsdBackward, ReferenceAgainstFiniteDifferences) {
  Rng rng(1);
  const SsdSizes s{.rows = 2, .length = 6, .heads = 4, .headdim = 2, .groups = 2, .d_state = 3};
  const auto check = [&](const char* option, const auto& set, std::int64_t rows = 2) {
    SCOPED_TRACE(option);
    SsdSizes sizes = s;
    sizes.rows = rows;
    SsdArgs f = plain_case(rng, sizes);
    set(f);
    expect_gradients(rng, f);
  };
  const auto everything = [&](SsdArgs& f) {
    f.D = random_tensor(rng, {4, 2});
    f.z = random_tensor(rng, f.x.shape(), DType::f32, -2, 2);
    f.dt = random_tensor(rng, f.dt.shape(), DType::f32, -3, 1);
    f.dt_bias = random_tensor(rng, {4});
    f.dt_softplus = true;
    f.dt_limit = {0.2F, 0.8F};
    f.initial_states = random_tensor(rng, state_shape(f));
  };
  check("plain", [](SsdArgs&) {});
  check("D by head", [&](SsdArgs& f) { f.D = random_tensor(rng, {4}); });
  check("D by channel", [&](SsdArgs& f) { f.D = random_tensor(rng, {4, 2}); });
  check("z", [&](SsdArgs& f) { f.z = random_tensor(rng, f.x.shape(), DType::f32, -2, 2); });
  check("dt_bias", [&](SsdArgs& f) { f.dt_bias = random_tensor(rng, {4}, DType::f32, 0.1, 0.3); });
  check("softplus", [&](SsdArgs& f) {
    f.dt = random_tensor(rng, f.dt.shape(), DType::f32, -3, 1);
    f.dt.data<float>()[3] = 25.0F;  // where softplus is the identity
    f.A.fill(-0.02);
    f.dt_softplus = true;
  });
  check("dt_limit", [&](SsdArgs& f) { f.dt_limit = {0.1F, 0.3F}; });
  check("initial_states", [&](SsdArgs& f) { f.initial_states = random_tensor(rng, state_shape(f)); });
  check("reverse", [&](SsdArgs& f) { f.reverse = true; });
  check("seq_idx", [&](SsdArgs& f) {
    f.initial_states = random_tensor(rng, state_shape(f));
    f.seq_idx = Tensor::from<std::int32_t>({-1, 3, 3, -1, 3, 5, 7, 7, -1, -1, -1, -1}, {2, 6});
  });
  check("everything", everything);
  check("everything, reverse and seq_idx", [&](SsdArgs& f) {
    everything(f);
    f.reverse = true;
    f.seq_idx = Tensor::from<std::int64_t>({-1, 3, 3, -1, 3, 5, 7, 7, 7, 1, 1, -1}, {2, 6});
  });
  check(
      "everything, packed",
      [&](SsdArgs& f) {
        f.cu_seqlens = Tensor::from<std::int64_t>({0, 2, 2, 5, 6});
        everything(f);
      },
      1);
}

TEST(SsdBackward, OverSizesAndLayouts) {
  Rng rng(2);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const std::int64_t length : {0, 1, 2, 5, 17, 65, 130}) {
      for (const std::int64_t headdim : {0, 1, 7, 16, 33}) {
        for (const std::int64_t d_state : {0, 1, 6, 16, 35}) {
          const int layout = static_cast<int>(pick(rng, 0, 3));
          SCOPED_TRACE(concat("L ", length, " P ", headdim, " N ", d_state, " ", dtype, " layout ", layout));
          const SsdArgs f = plain_case(
              rng,
              {.rows = 2, .length = length, .heads = 4, .headdim = headdim, .groups = 2, .d_state = d_state},
              dtype, layout);
          expect_fast_backward(backward_case(rng, f));
        }
      }
    }
  }
}

TEST(SsdBackward, OverRandomOptions) {
  Rng rng(3);
  for (int i = 0; i < 500; ++i) {
    std::string name;
    const SsdArgs f = random_case(rng, name);
    SCOPED_TRACE(concat("case ", i, ": ", name, " chunk ", f.chunk_size));
    SsdBackwardArgs args = backward_case(rng, f, true);
    if (coin(rng, 0.3)) args.dfinal_states = {};
    for (const NamedGradient& g : gradients_of_ssd())
      if (coin(rng, 0.15)) args.*g.tensor = {};
    expect_fast_backward(args, on_gpu() ? 2e-5 : 1e-5);  // other orders of f32 sums that cancel
    if (HasFailure()) return;
  }
}

TEST(SsdBackward, EachOptionAlone) {
  Rng rng(4);
  const SsdArgs plain = plain_case(rng, kOptionSizes);
  const auto check = [&](const char* option, const auto& set) {
    SCOPED_TRACE(option);
    SsdArgs f = plain;
    f.chunk_size = 16;
    set(f);
    expect_fast_backward(backward_case(rng, f));
  };
  check_each_option(rng, check);
  check("plain", [](SsdArgs&) {});
  check("z and D", [&](SsdArgs& f) {
    f.z = random_tensor(rng, f.x.shape());
    f.D = random_tensor(rng, {6, 20});
  });
}

TEST(SsdBackward, EachSimdTarget) {
  if (on_gpu()) GTEST_SKIP();
  on_each_target([] {
    Rng rng(5);
    for (int i = 0; i < 60; ++i) {
      std::string name;
      const SsdArgs f = random_case(rng, name);
      SCOPED_TRACE(concat("case ", i, ": ", name));
      expect_fast_backward(backward_case(rng, f, true));
    }
  });
}

TEST(SsdBackward, ModelShape) {
  Rng rng(6);
  SsdArgs f =
      plain_case(rng, {.rows = 1, .length = 150, .heads = 11, .headdim = 64, .groups = 1, .d_state = 128});
  f.D = random_tensor(rng, {11});
  f.dt = random_tensor(rng, f.dt.shape(), DType::f32, -1, 1);
  f.dt_bias = random_tensor(rng, {11}, DType::f32, -6, -2);
  f.dt_softplus = true;
  for (const bool initial : {false, true}) {
    if (initial) f.initial_states = random_tensor(rng, state_shape(f));
    expect_fast_backward(backward_case(rng, f));
  }
}

TEST(SsdBackward, TensorCoreShapes) {
  Rng rng(12);
  for (int i = 0; i < 60; ++i) {
    std::string name;
    const SsdArgs f = tensor_core_case(rng, i, name);
    SCOPED_TRACE(concat("case ", i, ": ", name));
    SsdBackwardArgs args = backward_case(rng, f);
    if (coin(rng, 0.3)) args.dfinal_states = {};
    for (const NamedGradient& g : gradients_of_ssd())
      if (coin(rng, 0.1)) args.*g.tensor = {};
    // Products of two operands that are rounded, of few terms.
    expect_fast_backward(args, 1e-5, 4.0 * rounding_of(f.x.dtype()));
    if (HasFailure()) return;
  }
}

// Many heads of a group, whose sums for dB and dC are divided among blocks, and runs that are cut; twice the
// same bits.
TEST(SsdBackward, TensorCoreHeads) {
  Rng rng(13);
  struct Shape {
    std::int64_t rows, length, heads, headdim, groups, d_state;
  };
  for (const Shape& s :
       {Shape{1, 1100, 5, 64, 1, 128}, Shape{3, 130, 26, 64, 2, 64}, Shape{2, 70, 9, 128, 1, 96},
        Shape{1, 40, 50, 64, 1, 128}, Shape{1, 8300, 1, 64, 1, 16}}) {
    SCOPED_TRACE(concat("L ", s.length, " H ", s.heads, " P ", s.headdim, " G ", s.groups, " N ", s.d_state));
    SsdArgs f = plain_case(rng,
                           {.rows = s.rows,
                            .length = s.length,
                            .heads = s.heads,
                            .headdim = s.headdim,
                            .groups = s.groups,
                            .d_state = s.d_state},
                           DType::bf16);
    f.D = random_tensor(rng, {s.heads});
    f.A = random_tensor(rng, {s.heads}, DType::f32, -2.0, -0.05);
    f.dt = random_tensor(rng, f.dt.shape(), DType::bf16, -3, 0);
    f.dt_bias = random_tensor(rng, {s.heads}, DType::f32, -1, 0);
    f.dt_softplus = true;
    f.initial_states = random_tensor(rng, state_shape(f));
    const SsdBackwardArgs args = backward_case(rng, f);
    SsdBackwardArgs again = args;
    for (const NamedGradient& g : gradients_of_ssd())
      if (args.*g.tensor) again.*g.tensor = (args.*g.tensor).clone();
    expect_fast_backward(args, 1e-5, 4.0 * rounding_of(DType::bf16));
    Context ctx({.threads = 2});
    again.forward.path = chunked_path();
    run(ctx, ssd_backward, again);
    for (const NamedGradient& g : gradients_of_ssd())
      if (args.*g.tensor) expect_same_bits(again.*g.tensor, args.*g.tensor, g.name);
  }
}

TEST(SsdBackward, ChunkSizesAgree) {
  Rng rng(7);
  SsdArgs f =
      plain_case(rng, {.rows = 1, .length = 300, .heads = 4, .headdim = 16, .groups = 2, .d_state = 16});
  f.A.fill(-0.01);  // long memory: what is carried over chunks matters
  for (const std::int64_t chunk : {1, 7, 16, 64, 256, 100000}) {
    SCOPED_TRACE(concat("chunk ", chunk));
    f.chunk_size = chunk;
    expect_fast_backward(backward_case(rng, f), 2e-5);
  }
}

// Exponents whose sums are large: their differences must keep their digits, and gradients by them that are
// sums of what others have as differences must not be lost in what cancels.
TEST(SsdBackward, LargeExponentSumsKeepPrecision) {
  Rng rng(8);
  SsdArgs f =
      plain_case(rng, {.rows = 1, .length = 256, .heads = 2, .headdim = 8, .groups = 1, .d_state = 8});
  f.A = Tensor::from<float>({-12.0F, -30.0F});
  f.dt = random_tensor(rng, {1, 256, 2}, DType::f32, 0.0, 0.01);
  // A few steps of strong decay among weak ones.
  for (std::int64_t t = 0; t < 256; t += 5) f.dt.data<float>()[t * 2] = 9.0F;
  f.chunk_size = 256;
  expect_fast_backward(backward_case(rng, f), 3e-6);
}

// Where everything is forgotten at once, the gradient by A is 0, not what large terms leave behind.
TEST(SsdBackward, UnderflowGivesZeroAndNoNan) {
  Context ctx;
  Rng rng(9);
  for (const float rate : {-1e4F, -1e30F, -std::numeric_limits<float>::max()}) {
    SCOPED_TRACE(rate);
    SsdArgs f =
        plain_case(rng, {.rows = 1, .length = 20, .heads = 2, .headdim = 5, .groups = 1, .d_state = 5});
    f.A.fill(static_cast<double>(rate));
    f.dt.fill(1.0);
    f.initial_states = random_tensor(rng, {1, 2, 5, 5});
    f.chunk_size = 8;
    const SsdBackwardArgs args = backward_case(rng, f);
    const Tensor dA = args.dA.clone();
    expect_fast_backward(args);
    expect_same_bits(args.dA, dA, "dA");
    expect_same_bits(args.dinitial_states, Tensor::zeros({1, 2, 5, 5}), "dinitial_states");
  }
}

}  // namespace
}  // namespace krait
