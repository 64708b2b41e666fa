#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "core/each_target.h"
#include "core/tensors.h"
#include "krait/core/error.h"
#include "krait/ops/selective_scan.h"
#include "ops/finite_difference.h"
#include "ops/selective_scan/scan.h"
#include "ops/selective_scan/scan_args.h"

namespace krait {
namespace {

using Args = SelectiveScanBackwardArgs;

// All gradients of a call, by name.
std::vector<std::pair<const char*, Tensor Args::*>> gradients() {
  return {{"du", &Args::du},
          {"ddelta", &Args::ddelta},
          {"dz", &Args::dz},
          {"dinitial_state", &Args::dinitial_state},
          {"dB", &Args::dB},
          {"dC", &Args::dC},
          {"dA", &Args::dA},
          {"dD", &Args::dD},
          {"ddelta_bias", &Args::ddelta_bias}};
}

std::int64_t state_count(const SelectiveScanArgs& forward) {
  return forward.cu_seqlens ? forward.cu_seqlens.size(0) - 1 : forward.u.size(0);
}

// Every gradient that `forward` has, with random numbers in it: those added to start from them, the others
// must replace them. Activation gradients have the dtype of the activations.
Args make_backward(const Options& o, std::uint64_t seed) {
  Args args{.forward = make_args(o, seed)};
  args.forward.return_last_state = false;
  args.forward.state_positions = {};
  const SelectiveScanArgs& f = args.forward;
  Rng rng(seed, 7);
  const auto like = [&](const Tensor& t) {
    return t ? random_tensor(rng, t.shape(), t.dtype(), -1, 1, o.scatter) : Tensor();
  };
  const auto like_u = [&] {
    return o.channel_last
               ? random_tensor(rng, {f.u.size(0), o.length, o.channels}, o.dtype, -1, 1).transpose(1, 2)
               : like(f.u);
  };
  args.dout = like_u();
  const Dims state_shape = {state_count(f), o.channels, o.d_state};
  args.dlast_state = random_tensor(rng, state_shape, f.A.dtype(), -1, 1, o.scatter);
  args.du = like_u();
  args.ddelta = like_u();
  if (f.z) args.dz = like_u();
  args.dinitial_state = random_tensor(rng, state_shape, f.A.dtype(), -1, 1, o.scatter);
  args.dB = like(f.B);
  args.dC = like(f.C);
  args.dA = like(f.A);
  args.dD = like(f.D);
  args.ddelta_bias = like(f.delta_bias);
  return args;
}

// Copies in f64 on the reference path; gradients are copies too.
Args in_double(Args args) {
  args.forward = in_double(args.forward);
  args.forward.path = ScanPath::reference;
  for (Tensor* t : {&args.dout, &args.dlast_state}) *t = in_double(*t);
  for (const auto& [name, member] : gradients())
    if (args.*member) args.*member = in_double(args.*member).clone();
  return args;
}

Args with_own_gradients(Args args) {
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

constexpr double kGradientPrecision = 2e-5;

void check(const Options& o, std::uint64_t seed) {
  SCOPED_TRACE(concat(describe(o), " seed ", seed));
  const Args args = make_backward(o, seed);
  Context ctx({.threads = 2});
  const Args expected = in_double(args);
  selective_scan_backward(ctx, expected);
  for (const ScanPath path : {ScanPath::reference, ScanPath::simd}) {
    SCOPED_TRACE(path == ScanPath::simd ? "simd" : "reference");
    Args found = with_own_gradients(args);
    found.forward.path = path;
    selective_scan_backward(ctx, found);
    for (const auto& [name, member] : gradients()) {
      const Tensor& gradient = found.*member;
      const double precision =
          gradient && is_float(gradient.dtype()) ? output_precision(gradient.dtype()) : 1e-6;
      expect_close(gradient, expected.*member, precision, kGradientPrecision, name);
    }
  }
}

// ---- the f64 reference against central differences

void check_differences(const Options& o, std::uint64_t seed) {
  SCOPED_TRACE(concat(describe(o), " seed ", seed));
  Args args = make_backward(o, seed);
  for (const auto& [name, member] : gradients())
    if (args.*member) (args.*member).fill(0);
  args = in_double(args);
  SelectiveScanArgs& f = args.forward;
  for (Tensor* t : {&f.u, &f.delta, &f.A, &f.B, &f.C, &f.D, &f.z, &f.delta_bias, &f.initial_state})
    if (*t) *t = t->contiguous();
  if (f.A.dtype() == DType::f64 && !f.initial_state)
    f.initial_state = Tensor::zeros(args.dinitial_state.shape(), DType::f64);
  Context ctx;
  selective_scan_backward(ctx, args);
  const auto loss = [&] {
    SelectiveScanArgs forward = f;
    forward.return_last_state = true;
    const SelectiveScanResult result = selective_scan(ctx, forward);
    return test::weighted_sum(result.out, args.dout) +
           test::weighted_sum(result.last_state, args.dlast_state);
  };
  const std::vector<std::pair<const Tensor*, Tensor Args::*>> inputs = {
      {&f.u, &Args::du},
      {&f.delta, &Args::ddelta},
      {&f.z, &Args::dz},
      {&f.initial_state, &Args::dinitial_state},
      {&f.B, &Args::dB},
      {&f.C, &Args::dC},
      {&f.A, &Args::dA},
      {&f.D, &Args::dD},
      {&f.delta_bias, &Args::ddelta_bias}};
  const auto names = gradients();
  for (const auto& [input, member] : inputs) {
    if (!*input) continue;
    const auto is_it = [member = member](const auto& named) { return named.second == member; };
    test::expect_gradient(loss, *input, args.*member, std::find_if(names.begin(), names.end(), is_it)->first);
  }
}

TEST(SelectiveScanBackward, ReferenceEqualsDifferences) {
  const Options plain = {.batch = 2, .channels = 4, .length = 6, .d_state = 3, .groups = 2};
  std::vector<Options> all(17, plain);
  all[1].groups = 1;
  all[2].constant_b = true;
  all[3].constant_c = true;
  all[4].skip = true;
  all[5].gate = true;
  all[6].bias = true;
  all[7].softplus = all[7].bias = true;
  all[8].reverse = all[8].initial = true;
  all[9].initial = true;
  all[10].sequences = 1;
  all[11].sequences = 2;
  all[12].sequences = 3;
  all[13].skip = all[13].gate = all[13].bias = all[13].softplus = all[13].initial = true;
  all[13].sequences = 2;
  all[14] = all[13];
  all[14].sequences = 3;
  all[14].reverse = true;
  all[15].constant_b = all[15].constant_c = all[15].initial = true;
  all[16] = all[13];
  all[16].reverse = true;
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i].dtype = DType::f32;
    check_differences(all[i], i);
    all[i].complex = true;
    check_differences(all[i], 100 + i);
  }
}

// ---- the fast path against the f64 reference

TEST(SelectiveScanBackward, SizesOfEachKind) {
  for (const std::int64_t channels : {1, 7, 8, 9, 31, 32, 33, 100, 300})
    check({.channels = channels, .length = 20, .skip = true, .gate = true, .softplus = true}, 1);
  for (const std::int64_t length : {1, 2, 63, 64, 65, 200})
    check({.channels = 9, .length = length, .softplus = true, .initial = true}, 2);
  for (const std::int64_t d_state : {1, 2, 3, 4, 5, 8, 16, 31, 64, 130})
    check({.channels = 9, .length = 40, .d_state = d_state, .softplus = true, .initial = true}, 3);
}

TEST(SelectiveScanBackward, EachOptionAlone) {
  const Options plain = {.batch = 2, .channels = 11, .length = 150, .d_state = 6};
  std::vector<Options> all(19, plain);
  all[0].groups = 11;
  all[1].dtype = DType::bf16;
  all[2].dtype = DType::f16;
  all[3].complex = true;
  all[4].constant_b = true;
  all[5].constant_c = true;
  all[6].skip = true;
  all[7].gate = true;
  all[8].bias = true;
  all[9].softplus = true;
  all[10].reverse = true;
  all[11].initial = true;
  all[12].sequences = 1;
  all[13].sequences = 2;
  all[14].sequences = 3;
  all[15].scatter = true;
  all[16].channel_last = true;
  all[17].complex = all[17].constant_b = all[17].constant_c = true;
  all[18].sequences = 3;
  all[18].reverse = all[18].initial = true;
  for (std::size_t i = 0; i < all.size(); ++i) check(all[i], 100 + i);
}

TEST(SelectiveScanBackward, RandomCombinations) {
  for (std::uint64_t seed = 0; seed < 250 && !HasFailure(); ++seed) check(random_options(seed), seed);
}

TEST(SelectiveScanBackward, EachTarget) {
  on_each_target([] {
    for (std::uint64_t seed = 1000; seed < 1040 && !HasFailure(); ++seed) check(random_options(seed), seed);
  });
}

}  // namespace
}  // namespace krait
