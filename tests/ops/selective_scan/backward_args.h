// Random arguments of selective_scan_backward with any options, and the comparison with the f64 reference.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "krait/core/error.h"
#include "krait/ops/selective_scan.h"
#include "ops/selective_scan/scan_args.h"

namespace krait::testing {

using BackwardArgs = SelectiveScanBackwardArgs;

// All gradients of a call, by name.
inline std::vector<std::pair<const char*, Tensor BackwardArgs::*>> gradients() {
  return {{"du", &BackwardArgs::du},
          {"ddelta", &BackwardArgs::ddelta},
          {"dz", &BackwardArgs::dz},
          {"dinitial_state", &BackwardArgs::dinitial_state},
          {"dB", &BackwardArgs::dB},
          {"dC", &BackwardArgs::dC},
          {"dA", &BackwardArgs::dA},
          {"dD", &BackwardArgs::dD},
          {"ddelta_bias", &BackwardArgs::ddelta_bias}};
}

inline std::int64_t state_count(const SelectiveScanArgs& forward) {
  return forward.cu_seqlens ? forward.cu_seqlens.size(0) - 1 : forward.u.size(0);
}

// Every gradient that `forward` has, with random numbers in it: those added to start from them, the others
// must replace them. Activation gradients have the dtype of the activations.
inline BackwardArgs make_backward(const Options& o, std::uint64_t seed) {
  BackwardArgs args{.forward = make_args(o, seed)};
  args.forward.return_last_state = false;
  args.forward.state_positions = {};
  const SelectiveScanArgs& f = args.forward;
  Rng rng(seed, 7);
  const auto like = [&](const Tensor& t) {
    return t ? random_tensor(rng, t.shape(), t.dtype(), -1, 1, o.layout()) : Tensor();
  };
  const auto like_u = [&] {
    return o.channel_last
               ? random_tensor(rng, {f.u.size(0), o.length, o.channels}, o.dtype, -1, 1).transpose(1, 2)
               : like(f.u);
  };
  args.dout = like_u();
  const Dims state_shape = {state_count(f), o.channels, o.d_state};
  args.dlast_state = random_tensor(rng, state_shape, f.A.dtype(), -1, 1, o.layout());
  args.du = like_u();
  args.ddelta = like_u();
  if (f.z) args.dz = like_u();
  args.dinitial_state = random_tensor(rng, state_shape, f.A.dtype(), -1, 1, o.layout());
  args.dB = like(f.B);
  args.dC = like(f.C);
  args.dA = like(f.A);
  args.dD = like(f.D);
  args.ddelta_bias = like(f.delta_bias);
  return args;
}

// Copies in f64 on the reference path; gradients are copies too.
inline BackwardArgs in_double(BackwardArgs args) {
  args.forward = in_double(args.forward);
  args.forward.path = ScanPath::reference;
  for (Tensor* t : {&args.dout, &args.dlast_state}) *t = in_double(*t);
  for (const auto& [name, member] : gradients())
    if (args.*member) args.*member = in_double(args.*member).clone();
  return args;
}

inline BackwardArgs with_own_gradients(BackwardArgs args) {
  for (const auto& [name, member] : gradients()) {
    Tensor& t = args.*member;
    if (!t) continue;
    // The same strides in memory of its own.
    std::int64_t low = 0;
    std::int64_t high = 0;
    for (int i = 0; i < t.ndim(); ++i)
      if (t.size(i) > 0) (t.stride(i) < 0 ? low : high) += (t.size(i) - 1) * t.stride(i);
    const Tensor copy = Tensor::zeros({high - low + 1}, t.dtype()).as_strided(t.shape(), t.strides(), -low);
    copy.copy_from(t);
    t = copy;
  }
  return args;
}

inline constexpr double kGradientPrecision = 2e-5;

// All paths against the f64 reference.
inline void check_backward(const Options& o, std::uint64_t seed) {
  SCOPED_TRACE(concat(describe(o), " seed ", seed));
  const BackwardArgs args = make_backward(o, seed);
  Context ctx({.threads = 2});
  const BackwardArgs expected = in_double(args);
  testing::run(ctx, selective_scan_backward, expected);
  for (const ScanPath path : {ScanPath::reference, fast_path()}) {
    SCOPED_TRACE(path == ScanPath::reference ? "reference" : "fast");
    BackwardArgs found = with_own_gradients(args);
    found.forward.path = path;
    testing::run(ctx, selective_scan_backward, found);
    for (const auto& [name, member] : gradients()) {
      const Tensor& gradient = found.*member;
      const double precision =
          gradient && is_float(gradient.dtype()) ? output_precision(gradient.dtype()) : 1e-6;
      expect_close(gradient, expected.*member, precision, kGradientPrecision, name);
    }
  }
}

}  // namespace krait::testing
