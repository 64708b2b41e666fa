#include "krait/ops/selective_scan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <string>
#include <vector>

#include "krait/core/error.h"
#include "ops/selective_scan/scan.h"
#include "ops/selective_scan/scan_args.h"

namespace krait {
namespace {

using namespace testing;

void check(const Options& o, std::uint64_t seed) {
  SCOPED_TRACE(concat(describe(o), " seed ", seed));
  SelectiveScanArgs args = make_args(o, seed);
  Context ctx({.threads = 2});
  SelectiveScanArgs exact = in_double(args);
  exact.path = ScanPath::reference;
  const SelectiveScanResult expected = testing::run(ctx, selective_scan, exact);
  for (const ScanPath path : {ScanPath::reference, fast_path()}) {
    SCOPED_TRACE(path == ScanPath::reference ? "reference" : "fast");
    args.path = path;
    const SelectiveScanResult found = testing::run(ctx, selective_scan, args);
    EXPECT_EQ(found.out.dtype(), args.u.dtype());
    expect_close(found.out, expected.out, output_precision(o.dtype), kPrecision, "out");
    expect_close(found.last_state, expected.last_state, 1e-6, kPrecision, "last_state");
    expect_close(found.states, expected.states, 1e-6, kPrecision, "states");
  }
}

TEST(SelectiveScan, OneChannelByHand) {
  // h = e^-0.5 * 1 + 0.5 * 2 * 3; out = (h * 4 + 10 * 3) * silu(0.25).
  Context ctx;
  for (const ScanPath path : {ScanPath::reference, fast_path()}) {
    const auto one = [](float v) { return Tensor::from(std::vector<float>{v}, {1, 1, 1}); };
    const SelectiveScanResult result = testing::run(ctx, selective_scan,
                                                    {.u = one(3),
                                                     .delta = one(0.25F),
                                                     .A = Tensor::from(std::vector<float>{-1}, {1, 1}),
                                                     .B = one(2),
                                                     .C = one(4),
                                                     .D = Tensor::from(std::vector<float>{10}),
                                                     .z = one(0.25F),
                                                     .delta_bias = Tensor::from(std::vector<float>{0.25F}),
                                                     .initial_state = one(1),
                                                     .return_last_state = true,
                                                     .path = path});
    const double h = std::exp(-0.5) + 3;
    EXPECT_NEAR(result.last_state.data<float>()[0], h, 1e-6);
    EXPECT_NEAR(result.out.data<float>()[0], (h * 4 + 30) * 0.25 / (1 + std::exp(-0.25)), 1e-5);
  }
}

TEST(SelectiveScan, SizesOfEachKind) {
  const std::vector<Options> all = each_size();
  for (std::size_t i = 0; i < all.size(); ++i) check(all[i], i);
}

TEST(SelectiveScan, SizesOfAGpu) {
  if (!testing::on_gpu()) GTEST_SKIP() << "of a GPU";
  const std::vector<Options> all = sizes_of_a_gpu();
  for (std::size_t i = 0; i < all.size(); ++i) check(all[i], i);
}

TEST(SelectiveScan, EachOptionAlone) {
  const Options plain = {.batch = 2, .channels = 11, .length = 70, .d_state = 6};
  std::vector<Options> all = each_option(plain);
  all.push_back(plain);
  all.back().positions = true;
  for (std::size_t i = 0; i < all.size(); ++i) check(all[i], 100 + i);
}

TEST(SelectiveScan, RandomCombinations) {
  for (std::uint64_t seed = 0; seed < 400 && !HasFailure(); ++seed) check(random_options(seed), seed);
}

TEST(SelectiveScan, EachTarget) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  on_each_target([] {
    for (std::uint64_t seed = 1000; seed < 1060 && !HasFailure(); ++seed) check(random_options(seed), seed);
  });
}

TEST(SelectiveScan, EmptySizes) {
  for (const bool initial : {false, true}) {
    check({.batch = 0, .initial = initial}, 1);
    check({.channels = 0, .initial = initial}, 2);
    check({.length = 0, .initial = initial}, 3);
    check({.d_state = 0, .skip = true, .initial = initial}, 4);
    check({.length = 0, .initial = initial, .sequences = 3}, 5);
  }
}

// Exponents far outside of the range of f32: decays are 0, and nothing becomes NaN.
TEST(SelectiveScan, DecaysUnderflow) {
  for (const double top : {60.0, 1e4, 1e30}) {
    SCOPED_TRACE(top);
    Options o = {.channels = 9, .length = 66, .d_state = 5, .initial = true};
    SelectiveScanArgs args = make_args(o, 5);
    Rng rng(9);
    args.A = random_tensor(rng, {9, 5}, DType::f32, -top, -top / 100);
    args.delta = random_tensor(rng, {2, 9, 66}, DType::f32, 0.5, 5);
    Context ctx;
    args.path = fast_path();
    const SelectiveScanResult found = testing::run(ctx, selective_scan, args);
    args.path = ScanPath::automatic;
    const SelectiveScanResult expected = testing::run(ctx, selective_scan, in_double(args));
    expect_close(found.out, expected.out, 1e-6, kPrecision, "out");
    expect_close(found.last_state, expected.last_state, 1e-6, kPrecision, "last_state");
  }
}

TEST(SelectiveScan, NotANumberStaysInItsChannel) {
  for (const auto which : {0, 1, 2}) {
    SelectiveScanArgs args = make_args({.batch = 1, .channels = 10, .length = 70, .softplus = true}, 8);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    if (which == 0) args.u.data<float>()[3 * 70 + 66] = nan;
    if (which == 1) args.delta.data<float>()[3 * 70 + 66] = nan;
    if (which == 2) args.A.data<float>()[3 * 4 + 2] = nan;
    Context ctx;
    const Tensor out = testing::run(ctx, selective_scan, args).out;
    for (std::int64_t c = 0; c < 10; ++c)
      for (std::int64_t t = 0; t < 70; ++t)
        EXPECT_EQ(std::isnan(out.data<float>()[c * 70 + t]), c == 3 && (which == 2 || t >= 66))
            << which << " channel " << c << " step " << t;
  }
}

TEST(SelectiveScan, SplitAnywhereEqualsOnePass) {
  const Options o = {.batch = 2,
                     .channels = 12,
                     .length = 90,
                     .d_state = 16,
                     .skip = true,
                     .softplus = true,
                     .initial = true};
  for (const bool complex : {false, true}) {
    Options options = o;
    options.complex = complex;
    const SelectiveScanArgs args = make_args(options, 3);
    Context ctx;
    const SelectiveScanResult whole = testing::run(ctx, selective_scan, args);
    for (const std::int64_t at : {0, 1, 33, 64, 90}) {
      SCOPED_TRACE(at);
      const std::int64_t parts = complex ? 2 : 1;
      const auto part = [&](std::int64_t begin, std::int64_t end, const Tensor& state) {
        SelectiveScanArgs a = args;
        for (Tensor* t : {&a.u, &a.delta}) *t = t->slice(2, begin, end);
        for (Tensor* t : {&a.B, &a.C}) *t = t->slice(3, parts * begin, parts * end);
        a.initial_state = state;
        return testing::run(ctx, selective_scan, a);
      };
      const SelectiveScanResult first = part(0, at, args.initial_state);
      const SelectiveScanResult second = part(at, 90, first.last_state);
      expect_same_bits(first.out, whole.out.slice(2, 0, at));
      expect_same_bits(second.out, whole.out.slice(2, at, 90));
      expect_same_bits(second.last_state, whole.last_state);
    }
  }
}

TEST(SelectiveScan, PackedSequencesEqualSeparateCalls) {
  for (const bool reverse : {false, true}) {
    const SelectiveScanArgs args = make_args({.channels = 20,
                                              .length = 83,
                                              .gate = true,
                                              .softplus = true,
                                              .reverse = reverse,
                                              .initial = true,
                                              .sequences = 3},
                                             4);
    Context ctx;
    const SelectiveScanResult packed = testing::run(ctx, selective_scan, args);
    const std::int64_t count = args.cu_seqlens.size(0) - 1;
    ASSERT_GT(count, 5);
    for (std::int64_t i = 0; i < count; ++i) {
      SCOPED_TRACE(i);
      const std::int64_t begin = args.cu_seqlens.data<std::int64_t>()[i];
      const std::int64_t end = args.cu_seqlens.data<std::int64_t>()[i + 1];
      SelectiveScanArgs one = args;
      one.cu_seqlens = {};
      for (Tensor* t : {&one.u, &one.delta, &one.z}) *t = t->slice(2, begin, end);
      for (Tensor* t : {&one.B, &one.C}) *t = t->slice(3, begin, end);
      one.initial_state = args.initial_state.slice(0, i, i + 1);
      const SelectiveScanResult alone = testing::run(ctx, selective_scan, one);
      expect_same_bits(packed.out.slice(2, begin, end), alone.out);
      expect_same_bits(packed.last_state.slice(0, i, i + 1), alone.last_state);
    }
  }
}

TEST(SelectiveScan, StatesAtPositionsAreThoseOfShorterCalls) {
  SelectiveScanArgs args = make_args({.batch = 1, .channels = 9, .length = 80, .initial = true}, 6);
  args.state_positions = Tensor::from(std::vector<std::int64_t>{79, 0, 63, 64, 0}, {1, 5});
  Context ctx;
  const Tensor states = testing::run(ctx, selective_scan, args).states;
  for (std::int64_t m = 0; m < 5; ++m) {
    const std::int64_t count = args.state_positions.data<std::int64_t>()[m] + 1;
    SelectiveScanArgs shorter = args;
    shorter.state_positions = {};
    for (Tensor* t : {&shorter.u, &shorter.delta}) *t = t->slice(2, 0, count);
    for (Tensor* t : {&shorter.B, &shorter.C}) *t = t->slice(3, 0, count);
    expect_same_bits(states.select(1, m), testing::run(ctx, selective_scan, shorter).last_state);
  }
}

TEST(SelectiveScan, StatesGoToTheirDestination) {
  for (const ScanPath path : {ScanPath::reference, fast_path()}) {
    SelectiveScanArgs args = make_args({.batch = 2, .channels = 9, .length = 40}, 8);
    args.path = path;
    args.state_positions = Tensor::from(std::vector<std::int64_t>{39, 0, 7, 7, 21, 3}, {2, 3});
    Context ctx;
    const Tensor expected = testing::run(ctx, selective_scan, args).states;
    // Not contiguous: every second channel of a larger tensor.
    args.states =
        Tensor::zeros({2, 3, 18, expected.size(3)})
            .as_strided(expected.shape(),
                        {3 * 18 * expected.size(3), 18 * expected.size(3), 2 * expected.size(3), 1}, 0);
    const SelectiveScanResult result = testing::run(ctx, selective_scan, args);
    expect_same_bits(args.states, expected);
    expect_same_bits(result.states, expected);
  }
}

TEST(SelectiveScan, PaddingBetweenTokensChangesNothing) {
  // The tokens 0, 2, 3, 6 of a row that is otherwise padding equal a row of those four.
  SelectiveScanArgs args = make_args({.batch = 1, .channels = 9, .length = 8, .initial = true}, 7);
  args.seq_idx = Tensor::from(std::vector<std::int64_t>{5, -1, 5, 5, -7, -1, 5, -1}, {1, 8});
  Context ctx;
  const SelectiveScanResult padded = testing::run(ctx, selective_scan, args);
  const std::int64_t kept[] = {0, 2, 3, 6};
  SelectiveScanArgs dense = args;
  dense.seq_idx = {};
  for (Tensor* t : {&dense.u, &dense.delta, &dense.B, &dense.C}) {
    Dims shape = t->shape();
    const int last = t->ndim() - 1;
    shape[last] = 4;
    const Tensor chosen = Tensor::empty(shape);
    for (std::int64_t i = 0; i < 4; ++i) chosen.select(last, i).copy_from(t->select(last, kept[i]));
    *t = chosen;
  }
  const SelectiveScanResult alone = testing::run(ctx, selective_scan, dense);
  expect_same_bits(padded.last_state, alone.last_state);
  for (std::int64_t i = 0; i < 4; ++i)
    expect_same_bits(padded.out.select(2, kept[i]), alone.out.select(2, i));
  for (const std::int64_t t : {1, 4, 5, 7})
    for (std::int64_t c = 0; c < 9; ++c) EXPECT_EQ(padded.out.data<float>()[c * 8 + t], 0.0F);
}

TEST(SelectiveScan, ThreadsDoNotMatter) {
  for (const std::int64_t channels : {40, 200}) {
    for (const int sequences : {0, 2, 3}) {
      const SelectiveScanArgs args = make_args({.channels = channels,
                                                .length = 150,
                                                .d_state = 16,
                                                .gate = true,
                                                .softplus = true,
                                                .sequences = sequences},
                                               11);
      Context one({.threads = 1});
      const SelectiveScanResult expected = testing::run(one, selective_scan, args);
      for (const int threads : {2, 3, 16}) {
        Context ctx({.threads = threads});
        const SelectiveScanResult found = testing::run(ctx, selective_scan, args);
        expect_same_bits(found.out, expected.out);
        expect_same_bits(found.last_state, expected.last_state);
      }
    }
  }
}

TEST(SelectiveScan, DestinationsMayBeInputs) {
  for (const ScanPath path : {ScanPath::reference, fast_path()}) {
    SelectiveScanArgs args = make_args({.length = 70, .skip = true, .gate = true, .initial = true}, 12);
    args.path = path;
    Context ctx;
    const SelectiveScanResult expected = testing::run(ctx, selective_scan, args);
    args.initial_state = args.initial_state.clone();
    args.last_state = args.initial_state;
    args.u = args.u.clone();
    args.out = args.u;
    const SelectiveScanResult found = testing::run(ctx, selective_scan, args);
    EXPECT_EQ(found.out.raw(), args.u.raw());
    EXPECT_EQ(found.last_state.raw(), args.initial_state.raw());
    expect_same_bits(found.out, expected.out);
    expect_same_bits(found.last_state, expected.last_state);
  }
}

TEST(SelectiveScan, NewOutputHasTheLayoutOfU) {
  Context ctx;
  const SelectiveScanArgs args = make_args({.batch = 2, .channels = 5, .length = 7, .channel_last = true}, 1);
  EXPECT_EQ(testing::run(ctx, selective_scan, args).out.strides(), (Dims{35, 1, 5}));
  EXPECT_EQ(testing::run(ctx, selective_scan, make_args({}, 1)).out.strides(), (Dims{35, 7, 1}));
}

TEST(SelectiveScan, ThreeDimensionalFactorsAreOneGroup) {
  Context ctx;
  SelectiveScanArgs args = make_args({.groups = 5}, 1);
  args.B = args.B.slice(1, 0, 1);
  SelectiveScanArgs squeezed = args;
  squeezed.B = args.B.squeeze(1);  // C keeps its 5 groups
  expect_same_bits(testing::run(ctx, selective_scan, args).out,
                   testing::run(ctx, selective_scan, squeezed).out);
}

TEST(SelectiveScan, Paths) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  Context ctx;
  SelectiveScanArgs args = make_args({}, 1);
  testing::run(ctx, selective_scan, args);
  EXPECT_EQ(ctx.backend(), concat("selective_scan: simd (", simd_target(), ")"));
  ctx.set_reference(true);
  testing::run(ctx, selective_scan, args);
  EXPECT_EQ(ctx.backend(), "selective_scan: reference");
  EXPECT_EQ(scan::choose_path(ScanPath::automatic, false, false), ScanPath::simd);
  EXPECT_EQ(scan::choose_path(ScanPath::automatic, true, false), ScanPath::reference);
  EXPECT_EQ(scan::choose_path(ScanPath::automatic, false, true), ScanPath::reference);
  EXPECT_EQ(scan::choose_path(ScanPath::simd, false, true), ScanPath::simd);
}

TEST(SelectiveScan, BlocksOfChannels) {
  EXPECT_EQ(scan::choose_channel_block(1, 1, 1536, 2), 64);
  EXPECT_EQ(scan::choose_channel_block(8, 1, 16, 2), 64);
  EXPECT_LT(scan::choose_channel_block(1, 1, 64, 4), 64);
  EXPECT_EQ(scan::choose_steps(16, false), 32);
  EXPECT_EQ(scan::choose_steps(1000, false), 8);
}

TEST(SelectiveScan, PathsOfAGpu) {
  if (!testing::on_gpu()) GTEST_SKIP() << "of a GPU";
  Context ctx;
  SelectiveScanArgs args = make_args({}, 1);
  testing::run(ctx, selective_scan, args);
  EXPECT_EQ(gpu_context().backend(), "selective_scan: cuda");
  args.path = ScanPath::simd;
  EXPECT_THROW(testing::run(ctx, selective_scan, args), Error);
}

TEST(SelectiveScan, LanesOfAGpu) {
  const auto plan = [](std::int64_t runs, std::int64_t channels, std::int64_t length, std::int64_t d_state) {
    return scan::choose_forward(runs, 1, channels, length, d_state, false, 132);
  };
  const auto channel_last = [](std::int64_t runs, std::int64_t channels) {
    return scan::choose_forward(runs, 1, channels, 2048, 16, true, 132).per_team;
  };
  const auto backward = [](std::int64_t runs, std::int64_t channels, std::int64_t d_state) {
    return scan::choose_backward(runs, 1, channels, 2048, true, d_state, 132);
  };
  // The more channels there are, the more of them share what is read of B and C.
  EXPECT_EQ(plan(8, 4096, 2048, 16).per_team, 4);
  EXPECT_EQ(plan(4, 4096, 2048, 16).per_team, 1);
  EXPECT_EQ(plan(4, 4096, 2048, 16).resident, 4);
  EXPECT_EQ(plan(2, 4096, 2048, 16).per_team, 1);
  EXPECT_EQ(plan(2, 4096, 2048, 16).resident, 2);
  EXPECT_EQ(plan(1, 4096, 2048, 16).per_team, 1);
  EXPECT_EQ(channel_last(8, 4096), 4);
  EXPECT_EQ(channel_last(4, 4096), 2);
  EXPECT_EQ(channel_last(1, 4096), 1);
  EXPECT_EQ(scan::choose_forward(1, 1, 4096, 2048, 16, true, 132).lanes, 4);
  // Blocks of 32 channels would leave most of the device idle.
  EXPECT_EQ(scan::choose_forward(1, 1, 1536, 2048, 16, true, 132).lanes, 8);
  EXPECT_EQ(backward(8, 4096, 16).per_team, 2);
  EXPECT_EQ(backward(8, 4096, 16).piece, 0);
  EXPECT_EQ(backward(1, 64, 16).lanes, 16);
  EXPECT_EQ(backward(1, 4096, 16).per_team, 2);
  EXPECT_EQ(backward(1, 4096, 16).piece, 512);
  EXPECT_EQ(scan::choose_backward(1, 1, 4096, 2048, false, 16, 132).piece, 0);
  EXPECT_EQ(scan::choose_backward(1, 1, 4096, 2047, true, 16, 132).piece, 0);  // pieces of whole tiles
  // One wave of blocks and a half are three half waves where pieces wait for one another.
  EXPECT_TRUE(backward(16, 1536, 16).in_turn);
  EXPECT_EQ(backward(16, 1536, 16).piece, 1024);
  EXPECT_FALSE(backward(8, 4096, 16).in_turn);
  EXPECT_FALSE(backward(1, 4096, 16).in_turn);
  EXPECT_FALSE(scan::choose_backward(16, 1, 1536, 2048, false, 16, 132).in_turn);
  EXPECT_EQ(scan::choose_backward(16, 1, 1536, 2000, true, 16, 132).piece, 1024);
  // Warps with roles of their own have blocks of 128 channels, of which few may be for nothing.
  const auto roles = [&](std::int64_t channels, std::int64_t d_state) {
    return scan::suits_roles(backward(300, channels, d_state), channels);
  };
  for (const std::int64_t channels : {100, 128, 640 - 64, 1536, 4096, 4160}) EXPECT_TRUE(roles(channels, 16));
  for (const std::int64_t channels : {64, 160, 192}) EXPECT_FALSE(roles(channels, 16));
  EXPECT_FALSE(roles(1536, 17));
  EXPECT_FALSE(scan::suits_roles(backward(1, 64, 16), 64));
  for (const std::int64_t d_state : {1, 16, 17, 32, 33, 64, 65, 256}) {
    for (const scan::LanePlan& p : {plan(1, 1536, 512, d_state), backward(1, 1536, d_state)}) {
      EXPECT_GE(p.lanes * p.states, d_state);
      EXPECT_EQ(p.lanes % p.per_team, 0);
    }
  }
  // Rows are cut where they leave most of a device idle, and where they are long.
  EXPECT_GE(plan(8, 4096, 65536, 16).piece, 65536);
  EXPECT_GE(plan(1, 4096, 65536, 16).piece, 65536);
  EXPECT_LT(plan(1, 256, 65536, 16).piece, 65536);
  EXPECT_GE(plan(1, 256, 256, 16).piece, 256);
  for (const std::int64_t length : {0, 1, 31, 32, 33, 1000, 65536})
    for (const std::int64_t channels : {0, 1, 100, 5000}) {
      const scan::LanePlan p = plan(1, channels, length, 16);
      EXPECT_GT(p.piece, 0);
      EXPECT_EQ(p.piece % scan::kCheckpointSteps, 0);
    }
  EXPECT_EQ(scan::count_checkpoints(0), 0);
  EXPECT_EQ(scan::count_checkpoints(32), 0);
  EXPECT_EQ(scan::count_checkpoints(33), 1);
  EXPECT_EQ(scan::count_checkpoints(65), 2);
}

// The message of the error that `args` lead to.
std::string message_of(const SelectiveScanArgs& args) {
  Context ctx;
  try {
    testing::run(ctx, selective_scan, args);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid_argument);
    return error.what();
  }
  return "no error";
}

TEST(SelectiveScan, RefusesWhatDoesNotFit) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  const auto with = [](auto change) {
    SelectiveScanArgs args = make_args({.batch = 2, .channels = 6, .length = 7, .d_state = 4}, 1);
    change(args);
    return message_of(args);
  };
  using Args = SelectiveScanArgs;
  const auto t = [](const Dims& shape, DType dtype = DType::f32) { return Tensor::zeros(shape, dtype); };
  const auto ids = [](std::vector<std::int64_t> v) { return Tensor::from(v); };
  EXPECT_EQ(with([](Args& a) { a.u = {}; }), "[selective_scan] u is absent");
  EXPECT_EQ(with([](Args& a) { a.B = {}; }), "[selective_scan] B is absent");
  EXPECT_EQ(with([&](Args& a) {
              a.u = t({2, 6});
            }),
            "[selective_scan] u has shape (2, 6), expected (B, D, L)");
  EXPECT_EQ(with([&](Args& a) {
              a.u = t({2, 6, 7}, DType::i32);
            }),
            "[selective_scan] u has dtype i32, expected f32, bf16, f16 or f64");
  EXPECT_EQ(with([&](Args& a) {
              a.delta = t({2, 6, 8});
            }),
            "[selective_scan] delta has shape (2, 6, 8), expected (2, 6, 7): as u");
  EXPECT_EQ(with([&](Args& a) {
              a.A = t({5, 4});
            }),
            "[selective_scan] A has shape (5, 4), expected (6, N): one row per channel");
  EXPECT_EQ(with([&](Args& a) {
              a.A = t({6, 4}, DType::bf16);
            }),
            "[selective_scan] A has dtype bf16, expected f32, f64, c64 or c128");
  EXPECT_EQ(with([&](Args& a) {
              a.B = t({2, 4, 4, 7});
            }),
            "[selective_scan] B has 4 groups, which do not divide the 6 channels");
  EXPECT_EQ(with([&](Args& a) {
              a.B = t({2, 0, 4, 7});
            }),
            "[selective_scan] B has 0 groups, which do not divide the 6 channels");
  EXPECT_EQ(with([&](Args& a) {
              a.B = t({2, 2, 4, 7}), a.C = t({2, 3, 4, 7});
            }),
            "[selective_scan] B has 2 groups and C has 3, expected the same number");
  EXPECT_EQ(with([&](Args& a) {
              a.C = t({2, 4, 8});
            }),
            "[selective_scan] C has shape (2, 1, 4, 8), expected (2, 1, 4, 7): (B, G, N, L)");
  EXPECT_EQ(with([&](Args& a) {
              a.C = t({6, 5});
            }),
            "[selective_scan] C has shape (6, 5), expected (6, 4): (D, N) for a constant one");
  EXPECT_EQ(with([&](Args& a) {
              a.A = t({6, 4}, DType::c64), a.B = t({6, 4});
            }),
            "[selective_scan] B has dtype f32, expected c64 or c128, as A has dtype c64");
  EXPECT_EQ(with([&](Args& a) {
              a.A = t({6, 4}, DType::c64);
            }),
            "[selective_scan] B has shape (2, 1, 4, 7), expected (2, 1, 4, 14): (B, G, N, 2L), real and "
            "imaginary parts interleaved");
  EXPECT_EQ(with([&](Args& a) { a.D = t({5}); }),
            "[selective_scan] D has shape (5,), expected (6,): one value per channel");
  EXPECT_EQ(with([&](Args& a) {
              a.z = t({2, 6, 1});
            }),
            "[selective_scan] z has shape (2, 6, 1), expected (2, 6, 7): as u");
  EXPECT_EQ(with([&](Args& a) {
              a.delta_bias = t({6, 1});
            }),
            "[selective_scan] delta_bias has shape (6, 1), expected (6,): one value per channel");
  EXPECT_EQ(with([&](Args& a) {
              a.initial_state = t({1, 6, 4});
            }),
            "[selective_scan] initial_state has shape (1, 6, 4), expected (2, 6, 4): one state per row");
  EXPECT_EQ(
      with([&](Args& a) {
        a.initial_state = t({2, 6, 4}, DType::c64);
      }),
      "[selective_scan] initial_state has dtype c64, expected f32, bf16, f16 or f64, as A has dtype f32");
  EXPECT_EQ(with([&](Args& a) {
              a.last_state = t({2, 6, 4}, DType::bf16);
            }),
            "[selective_scan] last_state has dtype bf16, expected f32");
  EXPECT_EQ(with([&](Args& a) {
              a.out = t({2, 6, 6});
            }),
            "[selective_scan] out has shape (2, 6, 6), expected (2, 6, 7): as u");
  EXPECT_EQ(with([&](Args& a) {
              a.seq_idx = t({2, 6}, DType::i32);
            }),
            "[selective_scan] seq_idx has shape (2, 6), expected (2, 7)");
  EXPECT_EQ(with([&](Args& a) {
              a.states = t({2, 1, 6, 4});
            }),
            "[selective_scan] states is given without state_positions, expected both");
  EXPECT_EQ(with([&](Args& a) {
              a.checkpoints = t({3, 4, 6});
            }),
            "[selective_scan] checkpoints has shape (3, 4, 6), expected (0, 4, 6): "
            "selective_scan_checkpoints_shape");
  EXPECT_EQ(with([&](Args& a) {
              a.state_positions = ids({3, 7}).view({2, 1});
            }),
            "[selective_scan] state_positions[1, 0] is 7, expected 0 to 6");
  EXPECT_EQ(with([&](Args& a) {
              a.cu_seqlens = ids({0, 7});
            }),
            "[selective_scan] cu_seqlens needs a batch of 1, found 2");
  EXPECT_EQ(with([&](Args& a) {
              a.seq_idx = t({2, 7}, DType::i32), a.cu_seqlens = ids({0, 7});
            }),
            "[selective_scan] seq_idx and cu_seqlens are both given, expected one of them");
  EXPECT_EQ(with([&](Args& a) { a = in_double(a), a.path = ScanPath::simd; }),
            "[selective_scan] the path simd has no f64, expected f32, bf16 and f16 inputs");
  const auto packed = [&](std::vector<std::int64_t> bounds) {
    SelectiveScanArgs args = make_args({.batch = 1, .channels = 6, .length = 7, .d_state = 4}, 1);
    args.cu_seqlens = ids(std::move(bounds));
    return message_of(args);
  };
  EXPECT_NE(packed({0, 4, 3, 7}).find("from 4 to 3"), std::string::npos);
  EXPECT_NE(packed({1, 7}).find("expected 0"), std::string::npos);
  EXPECT_NE(packed({0, 6}).find("expected 7"), std::string::npos);
}

}  // namespace
}  // namespace krait
