#include "krait/ops/state_update.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/ops/selective_scan.h"
#include "ops/random_tensors.h"
#include "ops/state_update/update.h"

namespace krait {
namespace {

using namespace testing;

struct Options {
  bool heads = true;  // a state (R, H, P, N), else (R, D, N) with D = channels
  std::int64_t batch = 2;
  std::int64_t tokens = 0;    // 0: x without T
  std::int64_t channels = 8;  // H, or D
  std::int64_t headdim = 4;
  std::int64_t d_state = 16;
  std::int64_t groups = 0;  // 0: B and C without G
  DType dtype = DType::f32;
  DType state_dtype = DType::f32;
  bool dt_per_head = false;
  int a_kind = 0;  // with heads: 0 (H), 1 (H, P, N), 2 (H, P, N) repeated with strides of 0
  int skip = 0;    // D: 0 none, 1 (H), 2 (H, P)
  int bias = 0;
  bool gate = false;
  bool softplus = false;
  bool limit = false;
  bool indices = false;
  bool scatter = false;

  [[nodiscard]] int layout() const { return scatter ? kScattered : 0; }
};

std::string describe(const Options& o) {
  return concat(o.heads ? "H " : "D ", o.channels, " P ", o.headdim, " N ", o.d_state, " B ", o.batch, " T ",
                o.tokens, " G ", o.groups, " ", name_of(o.dtype), " state ", name_of(o.state_dtype),
                o.dt_per_head ? " dt per head" : "", " A kind ", o.a_kind, " D ", o.skip, " bias ", o.bias,
                o.gate ? " z" : "", o.softplus ? " softplus" : "", o.limit ? " limit" : "",
                o.indices ? " indices" : "", o.scatter ? " scattered" : "");
}

StateUpdateArgs make_args(const Options& o, std::uint64_t seed) {
  Rng rng(seed);
  StateUpdateArgs args;
  const auto tensor = [&](const Dims& shape, DType dtype, double low, double high) {
    return random_tensor(rng, shape, dtype, low, high, o.layout());
  };
  const auto sequence = [&](std::initializer_list<std::int64_t> rest) {
    Dims shape = {o.batch};
    if (o.tokens > 0) shape.push_back(o.tokens);
    for (const std::int64_t size : rest) shape.push_back(size);
    return shape;
  };
  const std::int64_t rows = o.indices ? o.batch + 2 : o.batch;
  const Dims x_shape = o.heads ? sequence({o.channels, o.headdim}) : sequence({o.channels});
  args.state = o.heads ? tensor({rows, o.channels, o.headdim, o.d_state}, o.state_dtype, -1, 1)
                       : tensor({rows, o.channels, o.d_state}, o.state_dtype, -1, 1);
  args.x = tensor(x_shape, o.dtype, -2, 2);
  const Dims dt_shape = o.heads && o.dt_per_head ? sequence({o.channels}) : x_shape;
  args.dt = o.softplus ? tensor(dt_shape, o.dtype, -4, 3) : tensor(dt_shape, o.dtype, 0, 1);
  if (!o.heads)
    args.A = tensor({o.channels, o.d_state}, DType::f32, -3, -0.01);
  else if (o.a_kind == 1)
    args.A = tensor({o.channels, o.headdim, o.d_state}, DType::f32, -3, -0.01);
  else
    args.A = tensor({o.channels}, DType::f32, -3, -0.01);
  if (o.heads && o.a_kind == 2)
    args.A = args.A.unsqueeze(1).unsqueeze(2).expand({o.channels, o.headdim, o.d_state});
  const auto factor = [&] {
    return tensor(o.groups > 0 ? sequence({o.groups, o.d_state}) : sequence({o.d_state}), o.dtype, -1, 1);
  };
  args.B = factor();
  args.C = factor();
  const auto per_channel = [&](int kind) {
    if (kind == 0) return Tensor();
    return tensor(o.heads && kind == 2 ? Dims{o.channels, o.headdim} : Dims{o.channels}, DType::f32, -0.5,
                  0.5);
  };
  args.D = per_channel(o.skip);
  args.dt_bias = per_channel(o.bias);
  if (o.gate) args.z = tensor(x_shape, o.dtype, -4, 4);
  args.dt_softplus = o.softplus;
  if (o.limit) args.dt_limit = {0.1F, 0.6F};
  if (o.indices) {
    // Distinct rows in falling order; the second entry is padding.
    std::vector<std::int32_t> rows_of;
    for (std::int64_t b = 0; b < o.batch; ++b)
      rows_of.push_back(b == 1 ? -1 : static_cast<std::int32_t>(rows - 1 - b));
    args.state_batch_indices = Tensor::from(rows_of);
  }
  return args;
}

StateUpdateArgs in_double(StateUpdateArgs args) {
  for (Tensor* t :
       {&args.state, &args.x, &args.dt, &args.A, &args.B, &args.C, &args.D, &args.z, &args.dt_bias})
    if (*t) *t = t->to(DType::f64);
  return args;
}

// The path that is not the reference: that of the CPU, or the GPU's.
StateUpdatePath fast_path() { return testing::on_gpu() ? StateUpdatePath::automatic : StateUpdatePath::simd; }

double precision(DType dtype) { return dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 1e-6; }

constexpr double kPrecision = 4e-6;

void check(const Options& o, std::uint64_t seed) {
  SCOPED_TRACE(concat(describe(o), " seed ", seed));
  const StateUpdateArgs args = make_args(o, seed);
  Context ctx({.threads = 2});
  StateUpdateArgs exact = in_double(args);
  exact.state = exact.state.clone();
  const Tensor expected = testing::run(ctx, state_update, exact);
  for (const StateUpdatePath path : {StateUpdatePath::reference, fast_path()}) {
    SCOPED_TRACE(path == StateUpdatePath::reference ? "reference" : "fast");
    StateUpdateArgs found = make_args(o, seed);  // a state of its own, with the same strides
    found.path = path;
    const Tensor out = testing::run(ctx, state_update, found);
    EXPECT_EQ(out.dtype(), o.dtype);
    // A state of 16 bits is rounded after each token, which the f64 state is not.
    const double state_precision =
        precision(o.state_dtype) * static_cast<double>(std::max<std::int64_t>(o.tokens, 1));
    const double carried = o.tokens > 1 && o.state_dtype != DType::f32 ? 2 * state_precision : kPrecision;
    expect_close(out, expected, precision(o.dtype), carried, "out");
    expect_close(found.state, exact.state, state_precision, carried, "state");
  }
}

Options random_options(std::uint64_t seed) {
  Rng rng(seed, 1);
  const auto pick = [&](auto... values) {
    const std::int64_t all[] = {values...};
    return all[rng.next_u32() % sizeof...(values)];
  };
  const auto coin = [&] { return rng.next_u32() % 2 == 0; };
  const DType dtypes[] = {DType::f32, DType::f32, DType::bf16, DType::f16};
  Options o;
  o.heads = coin();
  o.batch = pick(1, 2, 3, 5);
  o.tokens = pick(0, 0, 1, 2, 5);
  o.groups = pick(0, 1, 2, 3);
  o.channels = std::max<std::int64_t>(o.groups, 1) * (o.heads ? pick(1, 2, 3) : pick(1, 5, 24, 70));
  o.headdim = pick(1, 3, 4, 8, 63, 64, 65, 130);
  o.d_state = pick(0, 1, 2, 7, 8, 16, 17, 32, 64, 100, 128);
  o.dtype = dtypes[rng.next_u32() % 4];
  o.state_dtype = dtypes[rng.next_u32() % 4];
  o.dt_per_head = coin();
  o.a_kind = static_cast<int>(pick(0, 1, 2));
  o.skip = static_cast<int>(pick(0, 1, 2));
  o.bias = static_cast<int>(pick(0, 1, 2));
  o.gate = coin();
  o.softplus = coin();
  o.limit = coin();
  o.indices = coin();
  o.scatter = coin();
  return o;
}

TEST(StateUpdate, OneStateByHand) {
  // d = 0.5; S = e^-0.5 * 1 + 0.5 * 2 * 3; out = (S * 4 + 10 * 3) * silu(0.25).
  for (const StateUpdatePath path : {StateUpdatePath::reference, fast_path()}) {
    const auto one = [](float v, const Dims& shape) { return Tensor::from(std::vector<float>{v}, shape); };
    Context ctx;
    StateUpdateArgs args = {.state = one(1, {1, 1, 1}),
                            .x = one(3, {1, 1}),
                            .dt = one(0.25F, {1, 1}),
                            .A = one(-1, {1, 1}),
                            .B = one(2, {1, 1}),
                            .C = one(4, {1, 1}),
                            .D = one(10, {1}),
                            .z = one(0.25F, {1, 1}),
                            .dt_bias = one(0.25F, {1}),
                            .path = path};
    const Tensor out = testing::run(ctx, state_update, args);
    const double s = std::exp(-0.5) + 3;
    EXPECT_NEAR(args.state.data<float>()[0], s, 1e-6);
    EXPECT_NEAR(out.data<float>()[0], (s * 4 + 30) * 0.25 / (1 + std::exp(-0.25)), 1e-5);
  }
}

TEST(StateUpdate, SizesOfEachKind) {
  for (const bool heads : {false, true}) {
    for (const std::int64_t d_state : {1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 64, 128, 200})
      check({.heads = heads, .d_state = d_state, .gate = true, .softplus = true}, 1);
    for (const std::int64_t channels : {1, 2, 3, 4, 5, 63, 64, 65, 200})
      check({.heads = heads, .channels = channels, .skip = 1, .softplus = true}, 2);
  }
  for (const std::int64_t headdim : {1, 2, 3, 4, 5, 63, 64, 65, 200})
    check({.headdim = headdim, .dt_per_head = true, .softplus = true}, 3);
}

TEST(StateUpdate, EachOptionAlone) {
  for (const bool heads : {false, true}) {
    const Options plain = {.heads = heads, .channels = 6, .headdim = 5, .d_state = 24};
    std::vector<Options> all(15, plain);
    all[0].tokens = 3;
    all[1].groups = 3;
    all[2].dtype = DType::bf16;
    all[3].dtype = DType::f16;
    all[4].state_dtype = DType::bf16;
    all[5].state_dtype = DType::f16;
    all[6].dt_per_head = true;
    all[7].a_kind = 1;
    all[8].a_kind = 2;
    all[9].skip = all[9].bias = 2;
    all[10].gate = true;
    all[11].softplus = true;
    all[12].limit = true;
    all[13].indices = true;
    all[14].scatter = true;
    for (std::size_t i = 0; i < all.size(); ++i) check(all[i], 100 + i);
  }
}

// As many channels as take the kernels of a GPU for large batches, and none that they divide.
TEST(StateUpdate, LargeBatches) {
  for (const DType state_dtype : {DType::f32, DType::bf16, DType::f16}) {
    Options o = {.batch = 5, .channels = 80, .headdim = 65, .d_state = 128, .state_dtype = state_dtype};
    o.dt_per_head = o.softplus = o.gate = o.indices = true;
    o.skip = o.bias = 1;
    check(o, 9);
    o.d_state = 64;
    o.groups = 2;
    o.dtype = DType::bf16;
    check(o, 11);
    o.tokens = 2;
    check(o, 12);
    o = {.heads = false, .batch = 14, .channels = 5121, .state_dtype = state_dtype, .softplus = true};
    check(o, 10);
    o.gate = o.indices = true;
    o.groups = 3;
    o.channels = 5121;
    o.skip = o.bias = 1;
    o.dtype = DType::f16;
    check(o, 13);
  }
}

// Whatever the size of the batch, and twice in a row.
TEST(StateUpdate, AnEntryHasTheSameBitsAloneAndAmongMany) {
  for (const DType state_dtype : {DType::f32, DType::bf16, DType::f16})
    for (const bool heads : {false, true}) {
      Options o = {.heads = heads, .batch = 17, .channels = 40, .headdim = 64, .d_state = 128};
      if (!heads) {
        o.channels = 3000;
        o.d_state = 16;
      }
      o.state_dtype = state_dtype;
      o.dt_per_head = o.softplus = o.gate = true;
      o.skip = o.bias = 1;
      Context ctx;
      StateUpdateArgs args = make_args(o, 14);
      const Tensor start = args.state.clone();
      const Tensor out = testing::run(ctx, state_update, args);
      StateUpdateArgs again = args;
      again.state = start.clone();
      expect_same_bits(testing::run(ctx, state_update, again), out);
      expect_same_bits(again.state, args.state);
      StateUpdateArgs alone = args;
      alone.state = start.slice(0, 16, 17).clone();
      for (Tensor* t : {&alone.x, &alone.dt, &alone.B, &alone.C, &alone.z}) *t = t->slice(0, 16, 17);
      expect_same_bits(testing::run(ctx, state_update, alone), out.slice(0, 16, 17));
      expect_same_bits(alone.state, args.state.slice(0, 16, 17));
    }
}

TEST(StateUpdate, PlansOfTheGpu) {
  using update::choose_stream_plan;
  const update::StreamSizes mamba2 = {
      .batch = 64, .heads = 80, .headdim = 64, .d_state = 128, .state = DType::f16};
  EXPECT_EQ(choose_stream_plan(mamba2, 132).tiles, 1);
  EXPECT_EQ(choose_stream_plan(mamba2, 132).items, 64 * 80);
  EXPECT_EQ(choose_stream_plan(mamba2, 132).blocks, 132 * 6);
  const auto plan_with = [&](auto change) {
    update::StreamSizes sizes = mamba2;
    change(sizes);
    return choose_stream_plan(sizes, 132);
  };
  EXPECT_EQ(plan_with([](auto& s) { s.state = DType::f32; }).tiles, 2);
  EXPECT_EQ(plan_with([](auto& s) { s.d_state = 64; }).tiles, 1);
  EXPECT_EQ(plan_with([](auto& s) { s.batch = 3; }).blocks, 0);
  EXPECT_EQ(plan_with([](auto& s) { s.tokens = 2; }).blocks, 0);
  EXPECT_EQ(plan_with([](auto& s) { s.decay_per_state = true; }).blocks, 0);
  EXPECT_EQ(plan_with([](auto& s) { s.d_state = 16; }).blocks, 0);
  update::StreamSizes mamba1 = {
      .batch = 64, .heads = 1, .headdim = 5120, .d_state = 16, .state = DType::f32, .decay_per_state = true};
  update::StreamPlan plan = choose_stream_plan(mamba1, 132);
  EXPECT_EQ(plan.tiles, 40);
  EXPECT_EQ(plan.blocks, 40 * 16);  // 19 entries at once: four rounds of 16
  mamba1.headdim = 1 << 20;         // more tiles than blocks: A would not stay
  EXPECT_EQ(choose_stream_plan(mamba1, 132).blocks, 0);
}

TEST(StateUpdate, RandomCombinations) {
  for (std::uint64_t seed = 0; seed < 400 && !HasFailure(); ++seed) check(random_options(seed), seed);
}

TEST(StateUpdate, EachTarget) {
  if (on_gpu()) GTEST_SKIP() << "of the CPU";
  on_each_target([] {
    for (std::uint64_t seed = 1000; seed < 1060 && !HasFailure(); ++seed) check(random_options(seed), seed);
  });
}

TEST(StateUpdate, EmptySizes) {
  for (const bool heads : {false, true}) {
    check({.heads = heads, .batch = 0}, 1);
    check({.heads = heads, .channels = 0}, 2);
    check({.heads = heads, .d_state = 0, .skip = 1}, 3);
  }
  check({.headdim = 0}, 4);
}

// Decoding step by step continues what the scan over a sequence began.
TEST(StateUpdate, StepsEqualTheScan) {
  constexpr std::int64_t kChannels = 36;
  constexpr std::int64_t kStates = 16;
  constexpr std::int64_t kLength = 20;
  Rng rng(3);
  const auto make = [&](const Dims& shape, double low, double high) {
    return random_tensor(rng, shape, DType::f32, low, high);
  };
  Context ctx;
  SelectiveScanArgs scan = {.u = make({2, kChannels, kLength}, -1, 1),
                            .delta = make({2, kChannels, kLength}, -2, 2),
                            .A = make({kChannels, kStates}, -4, 0),
                            .B = make({2, 3, kStates, kLength}, -1, 1),
                            .C = make({2, 3, kStates, kLength}, -1, 1),
                            .D = make({kChannels}, -1, 1),
                            .z = make({2, kChannels, kLength}, -1, 1),
                            .delta_bias = make({kChannels}, -1, 1),
                            .delta_softplus = true,
                            .return_last_state = true};
  const SelectiveScanResult whole = selective_scan(ctx, scan);
  const Tensor state = Tensor::zeros({2, kChannels, kStates});
  for (std::int64_t t = 0; t < kLength; ++t) {
    const Tensor out = testing::run(ctx, state_update,
                                    {.state = state,
                                     .x = scan.u.select(2, t),
                                     .dt = scan.delta.select(2, t),
                                     .A = scan.A,
                                     .B = scan.B.select(3, t),
                                     .C = scan.C.select(3, t),
                                     .D = scan.D,
                                     .z = scan.z.select(2, t),
                                     .dt_bias = scan.delta_bias,
                                     .dt_softplus = true});
    expect_close(out, whole.out.select(2, t), 1e-6, 2e-6, "out");
  }
  expect_close(state, whole.last_state, 1e-6, 2e-6, "state");
}

TEST(StateUpdate, SeveralTokensEqualSingleCalls) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const bool heads : {false, true}) {
      const Options o = {.heads = heads,
                         .tokens = 6,
                         .channels = 7,
                         .headdim = 9,
                         .d_state = 20,
                         .state_dtype = dtype,
                         .gate = true,
                         .softplus = true};
      Context ctx;
      StateUpdateArgs args = make_args(o, 4);
      const Tensor start = args.state.clone();
      const Tensor together = testing::run(ctx, state_update, args);
      StateUpdateArgs one = args;
      one.state = start;
      for (std::int64_t t = 0; t < 6; ++t) {
        one.x = args.x.select(1, t);
        one.dt = args.dt.select(1, t);
        one.B = args.B.select(1, t);
        one.C = args.C.select(1, t);
        one.z = args.z.select(1, t);
        expect_same_bits(testing::run(ctx, state_update, one), together.select(1, t));
      }
      expect_same_bits(one.state, args.state);
    }
  }
}

TEST(StateUpdate, PaddingSlotsLeaveEveryStateAlone) {
  for (const StateUpdatePath path : {StateUpdatePath::reference, fast_path()}) {
    StateUpdateArgs args = make_args({.batch = 4, .skip = 1, .gate = true}, 5);
    args.path = path;
    args.state_batch_indices = Tensor::from(std::vector<std::int64_t>{-1, 2, -5, 0});
    const Tensor before = args.state.clone();
    Context ctx;
    const Tensor out = testing::run(ctx, state_update, args);
    for (const std::int64_t b : {0, 2})
      for (const float y : out.select(0, b).contiguous().span<float>()) EXPECT_EQ(y, 0.0F);
    for (const std::int64_t row : {1, 3}) expect_same_bits(args.state.select(0, row), before.select(0, row));
    StateUpdateArgs alone = args;
    alone.state_batch_indices = {};
    alone.state = before.slice(0, 2, 3).clone();
    for (Tensor* t : {&alone.x, &alone.dt, &alone.B, &alone.C, &alone.z}) *t = t->slice(0, 1, 2);
    expect_same_bits(testing::run(ctx, state_update, alone), out.slice(0, 1, 2));
    expect_same_bits(alone.state, args.state.slice(0, 2, 3));
  }
}

// The values of indices are known to a GPU's kernel alone.
TEST(StateUpdate, RowsBeyondTheStateArePaddingOnAGpu) {
  if (!on_gpu()) GTEST_SKIP() << "an error on the CPU";
  for (const std::int64_t d_state : {16, 17}) {
    StateUpdateArgs args = make_args({.batch = 3, .d_state = d_state}, 5);
    args.state_batch_indices = Tensor::from(std::vector<std::int64_t>{3, 1, std::int64_t{1} << 40});
    const Tensor before = args.state.clone();
    Context ctx;
    const Tensor out = testing::run(ctx, state_update, args);
    for (const std::int64_t b : {0, 2})
      for (const float y : out.select(0, b).contiguous().span<float>()) EXPECT_EQ(y, 0.0F);
    for (const std::int64_t row : {0, 2}) expect_same_bits(args.state.select(0, row), before.select(0, row));
  }
}

TEST(StateUpdate, ThreadsDoNotMatter) {
  for (const bool heads : {false, true}) {
    const Options o = {.heads = heads,
                       .batch = 3,
                       .channels = heads ? 8 : 700,
                       .headdim = 70,
                       .d_state = 64,
                       .softplus = true};
    StateUpdateArgs expected = make_args(o, 6);
    Context one({.threads = 1});
    const Tensor expected_out = testing::run(one, state_update, expected);
    for (const int threads : {2, 3, 16}) {
      StateUpdateArgs found = make_args(o, 6);
      Context ctx({.threads = threads});
      expect_same_bits(testing::run(ctx, state_update, found), expected_out);
      expect_same_bits(found.state, expected.state);
    }
  }
}

TEST(StateUpdate, NotANumberStaysInItsChannel) {
  StateUpdateArgs args =
      make_args({.heads = false, .batch = 1, .channels = 10, .softplus = true, .limit = true}, 7);
  args.dt.data<float>()[3] = std::numeric_limits<float>::quiet_NaN();
  Context ctx;
  const Tensor out = testing::run(ctx, state_update, args);
  for (std::int64_t c = 0; c < 10; ++c) EXPECT_EQ(std::isnan(out.data<float>()[c]), c == 3) << c;
}

TEST(StateUpdate, OutMayBeX) {
  StateUpdateArgs args = make_args({.skip = 1, .gate = true}, 8);
  StateUpdateArgs in_place = make_args({.skip = 1, .gate = true}, 8);
  in_place.out = in_place.x;
  Context ctx;
  const Tensor expected = testing::run(ctx, state_update, args);
  EXPECT_EQ(testing::run(ctx, state_update, in_place).raw(), in_place.x.raw());
  expect_same_bits(in_place.x, expected);
}

TEST(StateUpdate, Paths) {
  if (on_gpu()) GTEST_SKIP() << "of the CPU";
  Context ctx;
  StateUpdateArgs args = make_args({}, 1);
  testing::run(ctx, state_update, args);
  EXPECT_EQ(ctx.backend(), concat("state_update: simd (", simd_target(), ")"));
  ctx.set_reference(true);
  testing::run(ctx, state_update, args);
  EXPECT_EQ(ctx.backend(), "state_update: reference");
  EXPECT_EQ(update::choose_path(StateUpdatePath::automatic, true, false), StateUpdatePath::reference);
  EXPECT_EQ(update::choose_path(StateUpdatePath::simd, false, true), StateUpdatePath::simd);
  EXPECT_EQ(update::choose_threads(100, false, 8), 1);
  EXPECT_EQ(update::choose_threads(1'000'000, false, 8), 8);
}

TEST(StateUpdate, PathsOfAGpu) {
  if (!on_gpu()) GTEST_SKIP() << "of a GPU";
  Context ctx;
  StateUpdateArgs args = make_args({}, 1);
  testing::run(ctx, state_update, args);
  EXPECT_EQ(gpu_context().backend(), "state_update: cuda");
  args.path = StateUpdatePath::simd;
  EXPECT_NE(message_of([&] { testing::run(ctx, state_update, args); }).find("a path of the CPU is asked for"),
            std::string::npos);
}

std::string message_of(const StateUpdateArgs& args) {
  Context ctx;
  try {
    testing::run(ctx, state_update, args);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid_argument);
    return error.what();
  }
  return "no error";
}

TEST(StateUpdate, RefusesWhatDoesNotFit) {
  if (on_gpu()) GTEST_SKIP() << "of the CPU";
  using Args = StateUpdateArgs;
  const auto with = [](bool heads, auto change) {
    // With heads (2, 6, 4, 16), else (2, 6, 16).
    StateUpdateArgs args = make_args({.heads = heads, .channels = 6}, 1);
    change(args);
    return message_of(args);
  };
  const auto t = [](const Dims& shape, DType dtype = DType::f32) { return Tensor::zeros(shape, dtype); };
  EXPECT_EQ(with(true, [](Args& a) { a.C = {}; }), "[state_update] C is absent");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.state = t({2, 6});
                 }),
            "[state_update] state has shape (2, 6), expected (R, D, N) or (R, H, P, N)");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.state = t({2, 6, 4, 16}, DType::i32);
                 }),
            "[state_update] state has dtype i32, expected f32, bf16, f16 or f64");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.x = t({2, 6});
                 }),
            "[state_update] x has shape (2, 6), expected (B, H, P) or (B, T, H, P)");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.x = t({2, 6, 5});
                 }),
            "[state_update] x has shape (2, 6, 5), expected (2, 6, 4): the state's channels");
  EXPECT_EQ(with(false,
                 [&](Args& a) {
                   a.x = t({2, 3, 6});
                 }),
            "[state_update] B has shape (2, 16), expected (B, T, N) or (B, T, G, N)");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.dt = t({2, 5});
                 }),
            "[state_update] dt has shape (2, 5), expected (2, 6): one value per head");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.dt = t({2, 6, 3});
                 }),
            "[state_update] dt has shape (2, 6, 3), expected (2, 6, 4): as x, or without P");
  EXPECT_EQ(with(true, [&](Args& a) { a.A = t({5}); }),
            "[state_update] A has shape (5,), expected (6,): one value per head");
  EXPECT_EQ(with(false, [&](Args& a) { a.A = t({6}); }),
            "[state_update] A has shape (6,), expected (6, 16): (D, N)");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.B = t({2, 15});
                 }),
            "[state_update] B has shape (2, 15), expected (2, 16): (B[, G], N)");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.B = t({2, 4, 16});
                 }),
            "[state_update] B and C have 4 groups, which do not divide the 6 heads");
  EXPECT_EQ(with(false,
                 [&](Args& a) {
                   a.B = t({2, 4, 16});
                 }),
            "[state_update] B and C have 4 groups, which do not divide the 6 channels");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.B = t({2, 2, 16}), a.C = t({2, 3, 16});
                 }),
            "[state_update] B has 2 groups and C has 3, expected the same number");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.D = t({6, 3});
                 }),
            "[state_update] D has shape (6, 3), expected (6, 4): (H) or (H, P)");
  EXPECT_EQ(with(false, [&](Args& a) { a.dt_bias = t({5}); }),
            "[state_update] dt_bias has shape (5,), expected (6,): one value per channel");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.z = t({2, 6, 1});
                 }),
            "[state_update] z has shape (2, 6, 1), expected (2, 6, 4): as x");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.state = t({3, 6, 4, 16});
                 }),
            "[state_update] state has 3 rows, expected 2: one for each entry of x");
  const auto indices = [](std::vector<std::int64_t> v) { return Tensor::from(v); };
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.state_batch_indices = indices({0, 2});
                 }),
            "[state_update] state_batch_indices[1] is 2, expected less than 2, the rows of state");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.state_batch_indices = indices({1, 1});
                 }),
            "[state_update] state_batch_indices names row 1 twice, expected distinct rows");
  EXPECT_EQ(with(true, [&](Args& a) { a.state_batch_indices = indices({0}); }),
            "[state_update] state_batch_indices has shape (1,), expected (2,): one index per entry of x");
  EXPECT_EQ(with(true, [&](Args& a) { a.state_batch_indices = t({2}); }),
            "[state_update] state_batch_indices has dtype f32, expected i32 or i64");
  EXPECT_EQ(with(true,
                 [](Args& a) {
                   a.dt_limit = {1, 0.5F};
                 }),
            "[state_update] dt_limit is (1, 0.5), expected low <= high");
  EXPECT_EQ(with(true,
                 [&](Args& a) {
                   a.out = t({2, 6, 4}, DType::f16);
                 }),
            "[state_update] out has dtype f16, expected f32, as x");
  EXPECT_EQ(with(true, [](Args& a) { a = in_double(a), a.path = StateUpdatePath::simd; }),
            "[state_update] the path simd has no f64, expected f32, bf16 and f16 tensors");
}

}  // namespace
}  // namespace krait
