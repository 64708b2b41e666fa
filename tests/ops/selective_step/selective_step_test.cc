#include "krait/ops/selective_step.h"

#include <gtest/gtest.h>

#include <string>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using namespace testing;

struct Options {
  std::int64_t batch = 1;
  std::int64_t channels = 96;
  std::int64_t d_state = 16;
  std::int64_t rank = 48;
  DType dtype = DType::f16;
  DType state = DType::f32;
  bool gate = true;
  bool skip = true;
  bool bias = true;
  bool indices = false;
  bool scatter = false;
};

SelectiveStepArgs make_args(const Options& o) {
  Rng rng(static_cast<std::uint64_t>(o.batch * 1000 + o.channels + o.rank));
  const int layout = o.scatter ? kScattered : 0;
  SelectiveStepArgs args;
  const std::int64_t rows = o.indices ? o.batch + 2 : o.batch;
  args.state = random_tensor(rng, {rows, o.channels, o.d_state}, o.state, -1, 1, layout);
  args.x = random_tensor(rng, {o.batch, o.channels}, o.dtype, -1, 1, layout);
  // Columns of one matrix, as x_proj gives them.
  const Tensor projected = random_tensor(rng, {o.batch, o.rank + 2 * o.d_state}, o.dtype, -1, 1, layout);
  args.low_dt = projected.slice(1, 0, o.rank);
  args.B = projected.slice(1, o.rank, o.rank + o.d_state);
  args.C = projected.slice(1, o.rank + o.d_state, o.rank + 2 * o.d_state);
  args.dt_weight = random_tensor(rng, {o.channels, o.rank}, o.dtype, -0.2, 0.2, layout);
  args.A = random_tensor(rng, {o.channels, o.d_state}, DType::f32, -8, -0.5, layout);
  if (o.bias) args.dt_bias = random_tensor(rng, {o.channels}, DType::f32, -3, 1);
  if (o.skip) args.D = random_tensor(rng, {o.channels}, DType::f32, -1, 1);
  if (o.gate)
    args.z =
        random_tensor(rng, {o.batch, 2 * o.channels}, o.dtype, -2, 2).slice(1, o.channels, 2 * o.channels);
  if (o.indices) {
    args.state_batch_indices = Tensor::empty({o.batch}, DType::i64);
    for (std::int64_t i = 0; i < o.batch; ++i)
      args.state_batch_indices.data<std::int64_t>()[i] = i == 1 ? -1 : o.batch + 1 - i;
  }
  return args;
}

void expect_the_operators(const Options& o) {
  SCOPED_TRACE(concat("B ", o.batch, " D ", o.channels, " N ", o.d_state, " rank ", o.rank, " ", o.dtype,
                      " state ", o.state, o.gate ? " z" : "", o.skip ? " D" : "", o.bias ? " bias" : "",
                      o.indices ? " indices" : "", o.scatter ? " scattered" : ""));
  Context ctx;
  const SelectiveStepArgs args = make_args(o);
  SelectiveStepArgs wide = make_args(o);
  for (Tensor* t : {&wide.x, &wide.low_dt, &wide.B, &wide.C, &wide.dt_weight, &wide.z, &wide.state})
    if (*t) *t = t->to(DType::f32);
  const Tensor want = selective_step(ctx, wide);
  const Tensor found = run(ctx, selective_step, args);
  const double tolerance = 4 * std::max(rounding_of(o.dtype), rounding_of(o.state));
  expect_close(found, want, tolerance, tolerance, "out");
  expect_close(args.state, wide.state, tolerance, tolerance, "state");
  if (!on_gpu()) return;
  const SelectiveStepArgs second = make_args(o);
  expect_same_bits(run(ctx, selective_step, second), found, "out again");
  expect_same_bits(second.state, args.state, "state again");
}

TEST(SelectiveStep, IsItsOperators) {
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32})
    for (const std::int64_t batch : {1, 2, 5})
      for (const std::int64_t d_state : {8, 16, 32, 64, 12}) {
        expect_the_operators({.batch = batch, .d_state = d_state, .dtype = dtype});
        expect_the_operators({.batch = batch, .channels = 1531, .d_state = d_state, .dtype = dtype});
      }
  for (const std::int64_t rank : {8, 40, 160, 192, 200, 3})
    expect_the_operators({.channels = 2560, .rank = rank});
}

TEST(SelectiveStep, Options) {
  for (const std::int64_t batch : {1, 3}) {
    expect_the_operators({.batch = batch, .gate = false});
    expect_the_operators({.batch = batch, .skip = false, .bias = false});
    expect_the_operators({.batch = batch, .indices = true});
    expect_the_operators({.batch = batch, .scatter = true});
    expect_the_operators({.batch = batch, .state = DType::f16, .indices = true});
    expect_the_operators({.batch = batch, .dtype = DType::bf16, .state = DType::bf16});
  }
}

TEST(SelectiveStep, NamesWhatDoesNotFit) {
  Context ctx;
  SelectiveStepArgs args = make_args({});
  args.dt_weight = Tensor::zeros({96, 47});
  EXPECT_EQ(message_of([&] { (void)selective_step(ctx, args); }),
            "[selective_step] dt_weight has shape (96, 47), expected (96, 48)");
}

}  // namespace
}  // namespace krait
