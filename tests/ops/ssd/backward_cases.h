// Arguments of ssd_backward, and the chunked path against the reference in f64.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "krait/core/context.h"
#include "krait/ops/ssd.h"
#include "ops/random_tensors.h"
#include "ops/ssd/ssd_cases.h"

namespace krait::testing {

struct NamedGradient {
  const char* name;
  Tensor SsdBackwardArgs::*tensor;
  bool added;
};

inline const std::vector<NamedGradient>& gradients_of_ssd() {
  static const std::vector<NamedGradient> all = {
      {"dx", &SsdBackwardArgs::dx, false},
      {"ddt", &SsdBackwardArgs::ddt, false},
      {"dB", &SsdBackwardArgs::dB, false},
      {"dC", &SsdBackwardArgs::dC, false},
      {"dz", &SsdBackwardArgs::dz, false},
      {"dinitial_states", &SsdBackwardArgs::dinitial_states, false},
      {"dA", &SsdBackwardArgs::dA, true},
      {"dD", &SsdBackwardArgs::dD, true},
      {"ddt_bias", &SsdBackwardArgs::ddt_bias, true}};
  return all;
}

inline Dims state_shape(const SsdArgs& f) {
  const std::int64_t sequences = f.cu_seqlens ? f.cu_seqlens.size(0) - 1 : f.x.size(0);
  return {sequences, f.x.size(2), f.x.size(3), f.B.size(3)};
}

// Random dout and dfinal_states, and every destination that the inputs allow. Written ones start from NaN,
// added ones from random numbers.
inline SsdBackwardArgs backward_case(Rng& rng, const SsdArgs& forward, bool random_layouts = false) {
  const auto layout = [&] { return random_layouts ? static_cast<int>(pick(rng, 0, 3)) : 0; };
  const DType dtype = forward.x.dtype();
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto written = [&](const Tensor& like, DType type) {
    if (!like) return Tensor();
    const Tensor t = laid_out(Tensor::zeros(like.shape(), type), layout());
    t.fill(std::numeric_limits<double>::quiet_NaN());
    return t;
  };
  const auto added = [&](const Tensor& like) {
    return like ? random_tensor(rng, like.shape(), wide, -1, 1, layout()) : Tensor();
  };
  SsdBackwardArgs args{.forward = forward,
                       .dout = random_tensor(rng, forward.x.shape(), dtype, -1, 1, layout()),
                       .dx = written(forward.x, dtype),
                       .ddt = written(forward.dt, forward.dt.dtype()),
                       .dB = written(forward.B, dtype),
                       .dC = written(forward.C, dtype),
                       .dz = written(forward.z, dtype),
                       .dA = added(forward.A),
                       .dD = added(forward.D),
                       .ddt_bias = added(forward.dt_bias)};
  args.dfinal_states = random_tensor(rng, state_shape(forward), wide, -1, 1, layout());
  args.dinitial_states = written(args.dfinal_states, wide);
  return args;
}

// The same in f64 for the reference: written destinations are new, added ones are copies.
inline SsdBackwardArgs in_f64(const SsdBackwardArgs& args) {
  SsdBackwardArgs wide = args;
  wide.forward = in_f64(args.forward);
  wide.dout = to_f64(args.dout);
  wide.dfinal_states = to_f64(args.dfinal_states);
  for (const NamedGradient& g : gradients_of_ssd())
    if (args.*g.tensor) wide.*g.tensor = (args.*g.tensor).to(DType::f64).clone();
  return wide;
}

// Of each head the sum of |d_t g_t| over all tokens, where g_t is the gradient by the exponent d_t A and dA
// the sum of d_t g_t. `args` are in f64.
inline Tensor terms_of_dA(const SsdBackwardArgs& args) {
  // With d itself as dt, ddt_t is x_t . v_t + A g_t, where dx_t is d_t v_t + D dy_t.
  const SsdArgs& given = args.forward;
  SsdBackwardArgs b{.forward = given, .dout = args.dout, .dfinal_states = args.dfinal_states};
  const std::int64_t heads = given.x.size(2);
  const std::int64_t channels = given.x.size(3);
  const Tensor d = given.dt.contiguous().clone();
  const auto steps = d.span<double>();
  for (std::size_t i = 0; i < steps.size(); ++i) {
    if (given.dt_bias)
      steps[i] += given.dt_bias.contiguous().span<double>()[i % static_cast<std::size_t>(heads)];
    if (given.dt_softplus && steps[i] <= 20.0) steps[i] = std::log1p(std::exp(steps[i]));
    steps[i] = std::clamp(steps[i], double{given.dt_limit.low}, double{given.dt_limit.high});
  }
  b.forward.dt = d;
  b.forward.dt_bias = {};
  b.forward.dt_softplus = false;
  b.forward.dt_limit = {};
  b.dx = Tensor::zeros(given.x.shape(), DType::f64);
  b.ddt = Tensor::zeros(d.shape(), DType::f64);
  Context ctx({.threads = 2});
  run(ctx, ssd_backward, b);

  const auto numbers = [](const Tensor& t) { return t.contiguous(); };
  const Tensor x = numbers(given.x), dout = numbers(args.dout), A = numbers(given.A);
  const Tensor z = given.z ? numbers(given.z) : Tensor();
  const Tensor D = given.D ? numbers(given.D) : Tensor();
  const Tensor result = Tensor::zeros({heads}, DType::f64);
  for (std::int64_t i = 0; i < d.numel(); ++i) {
    const std::int64_t h = i % heads;
    const double step = d.data<double>()[i];
    double x_dx = 0.0;
    double skip = 0.0;  // x . D dy
    for (std::int64_t p = 0; p < channels; ++p) {
      const std::int64_t at = i * channels + p;
      double dy = dout.data<double>()[at];
      if (z) dy *= z.data<double>()[at] / (1.0 + std::exp(-z.data<double>()[at]));
      x_dx += x.data<double>()[at] * b.dx.data<double>()[at];
      if (D) skip += x.data<double>()[at] * dy * D.data<double>()[D.ndim() == 1 ? h : h * channels + p];
    }
    // Tokens that are left out have no gradients at all.
    if (step == 0.0 || (x_dx == 0.0 && b.ddt.data<double>()[i] == 0.0)) continue;
    const double exponent = b.ddt.data<double>()[i] - (x_dx - skip) / step;
    result.data<double>()[h] += std::abs(step * exponent / A.data<double>()[h]);
  }
  return result;
}

// `operands`: what a GPU may lose, relative to the largest of a gradient, where tensor cores take 16-bit
// operands. Of dA, one number for all tokens of a head, chance may leave next to nothing, while what its
// terms have lost stays: its bound is their sum without signs. A term is a product of two operands that are
// rounded (S and G; C B^T and one that is not), each by half a rounding at most, which makes one, and twice
// that serves for what cancels inside of g_t. Over 270 heads of these tests the largest error was 0.76
// roundings of that sum, and up to 90 of |dA| itself.
inline void expect_fast_backward(const SsdBackwardArgs& args, double tolerance = 1e-5,
                                 double operands = 0.0) {
  if (on_gpu() && operands > 0.0) tolerance = operands;

  Context ctx({.threads = 2});
  const SsdBackwardArgs given = in_f64(args);
  const SsdBackwardArgs exact = in_f64(args);
  run(ctx, ssd_backward, exact);
  EXPECT_EQ(ctx.backend(), "ssd_backward: reference");
  SsdBackwardArgs fast = args;
  fast.forward.path = chunked_path();
  run(ctx, ssd_backward, fast);
  if (!on_gpu()) {
    EXPECT_EQ(ctx.backend(), concat("ssd_backward: chunked (", simd_target(), ")"));
  }
  for (const NamedGradient& g : gradients_of_ssd()) {
    const Tensor& found = args.*g.tensor;
    if (!found) continue;
    const double rounding = found.dtype() == DType::f32 ? 0.0 : rounding_of(found.dtype());
    if (on_gpu() && operands > 0.0 && std::string(g.name) == "dA") {
      const Tensor terms = terms_of_dA(given);
      const Tensor numbers = found.to(DType::f64).contiguous();
      const Tensor expected = exact.dA.contiguous();
      for (std::int64_t h = 0; h < terms.numel(); ++h) {
        const double y = expected.data<double>()[h];
        const double error = std::abs(numbers.data<double>()[h] - y);
        EXPECT_LE(error, 2.0 * rounding_of(args.forward.x.dtype()) * terms.data<double>()[h] +
                             1e-6 * (1.0 + std::abs(y)))
            << "dA of head " << h << ": " << numbers.data<double>()[h] << ", expected " << y << " of terms "
            << terms.data<double>()[h];
      }
      continue;
    }
    // Subnormal f16 values are coarse.
    expect_close(found, exact.*g.tensor, rounding, tolerance + (found.dtype() == DType::f16 ? 1e-6 : 0.0),
                 g.name);
  }
}

}  // namespace krait::testing
