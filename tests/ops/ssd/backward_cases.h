// Arguments of ssd_backward, and the chunked path against the reference in f64.
#pragma once

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

// `operands`: what a GPU may lose, relative to the largest of a gradient, where tensor cores take 16-bit
// operands.
inline void expect_fast_backward(const SsdBackwardArgs& args, double tolerance = 1e-5,
                                 double operands = 0.0) {
  if (on_gpu() && operands > 0.0) tolerance = operands;

  Context ctx({.threads = 2});
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
    // dA is one number for all tokens and states of a head, whose terms cancel: what each of them lost to the
    // rounding of operands stays.
    const bool cancels = on_gpu() && operands > 0.0 && std::string(g.name) == "dA";
    // Subnormal f16 values are coarse.
    expect_close(found, exact.*g.tensor, rounding,
                 (cancels ? 3.0 : 1.0) * tolerance + (found.dtype() == DType::f16 ? 1e-6 : 0.0), g.name);
  }
}

}  // namespace krait::testing
