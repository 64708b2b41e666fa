// The numbers: the f64 reference against differences, all paths against the f64 reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "krait/ops/selective_scan.h"
#include "ops/finite_difference.h"
#include "ops/selective_scan/backward_args.h"

namespace krait {
namespace {

using namespace testing;

using Args = SelectiveScanBackwardArgs;

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
  testing::run(ctx, selective_scan_backward, args);
  const auto loss = [&] {
    SelectiveScanArgs forward = f;
    forward.return_last_state = true;
    const SelectiveScanResult result = testing::run(ctx, selective_scan, forward);
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

TEST(SelectiveScanBackward, SizesOfEachKind) {
  const std::vector<Options> all = each_size();
  for (std::size_t i = 0; i < all.size(); ++i) check_backward(all[i], i);
}

TEST(SelectiveScanBackward, SizesOfAGpu) {
  if (!testing::on_gpu()) GTEST_SKIP() << "of a GPU";
  const std::vector<Options> all = sizes_of_a_gpu();
  for (std::size_t i = 0; i < all.size(); ++i) check_backward(all[i], i);
}

TEST(SelectiveScanBackward, EachOptionAlone) {
  const std::vector<Options> all = each_option({.batch = 2, .channels = 11, .length = 150, .d_state = 6});
  for (std::size_t i = 0; i < all.size(); ++i) check_backward(all[i], 100 + i);
}

TEST(SelectiveScanBackward, RandomCombinations) {
  for (std::uint64_t seed = 0; seed < 150 && !HasFailure(); ++seed)
    check_backward(random_options(seed), seed);
}

TEST(SelectiveScanBackward, EachTarget) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  on_each_target([] {
    for (std::uint64_t seed = 1000; seed < 1040 && !HasFailure(); ++seed)
      check_backward(random_options(seed), seed);
  });
}

}  // namespace
}  // namespace krait
