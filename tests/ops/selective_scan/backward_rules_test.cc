// What holds whatever the numbers are: threads, checkpoints, sequences, padding, errors.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "krait/core/error.h"
#include "krait/ops/selective_scan.h"
#include "ops/selective_scan/backward_args.h"
#include "ops/selective_scan/scan.h"

namespace krait {
namespace {

using namespace testing;

using Args = SelectiveScanBackwardArgs;

void expect_same_gradients(const Args& found, const Args& expected) {
  for (const auto& [name, member] : gradients()) {
    SCOPED_TRACE(name);
    ASSERT_EQ((found.*member).defined(), (expected.*member).defined());
    if (found.*member) expect_same_bits(found.*member, expected.*member);
  }
}

Args run(Args args, int threads = 2) {
  args = with_own_gradients(args);
  Context ctx({.threads = threads});
  testing::run(ctx, selective_scan_backward, args);
  return args;
}

TEST(SelectiveScanBackward, EmptySizes) {
  for (const bool initial : {false, true}) {
    check_backward({.batch = 0, .initial = initial}, 1);
    check_backward({.channels = 0, .initial = initial}, 2);
    check_backward({.length = 0, .initial = initial}, 3);
    check_backward({.d_state = 0, .skip = true, .gate = true, .initial = initial}, 4);
    check_backward({.length = 0, .initial = initial, .sequences = 3}, 5);
  }
}

TEST(SelectiveScanBackward, ThreadsDoNotMatter) {
  for (const std::int64_t channels : {40, 200, 700}) {
    for (const int sequences : {0, 2, 3}) {
      Options o = {.batch = 3, .channels = channels, .length = 90, .d_state = 5, .skip = true, .gate = true};
      o.bias = o.softplus = true;
      o.sequences = sequences;
      o.constant_c = channels == 200;
      SCOPED_TRACE(describe(o));
      const Args args = make_backward(o, 11);
      const Args expected = run(args, 1);
      for (const int threads : {2, 3, 16}) expect_same_gradients(run(args, threads), expected);
    }
  }
}

TEST(SelectiveScanBackward, CheckpointsOfTheForwardGiveTheSameBits) {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Options o = random_options(seed);
    o.length = 40 + 30 * static_cast<std::int64_t>(seed % 5);
    o.positions = seed % 2 == 0;
    SCOPED_TRACE(describe(o));
    Args args = make_backward(o, seed);
    const Args expected = run(args);
    SelectiveScanArgs forward = args.forward;
    forward.return_checkpoints = true;
    if (o.positions) forward.state_positions = make_args(o, seed).state_positions;
    Context ctx({.threads = 3});
    const SelectiveScanResult result = testing::run(ctx, selective_scan, forward);
    ASSERT_TRUE(result.checkpoints.defined());
    forward.return_checkpoints = false;
    const SelectiveScanResult without = testing::run(ctx, selective_scan, forward);
    expect_same_bits(result.out, without.out);
    if (o.positions) expect_same_bits(result.states, without.states);
    args.checkpoints = result.checkpoints;
    expect_same_gradients(run(args), expected);
    if (result.checkpoints.numel() == 0) continue;
    // They are used: others give another result.
    args.checkpoints = Tensor::zeros(result.checkpoints.shape(), result.checkpoints.dtype());
    args.checkpoints.fill(3);
    const Args other = run(args);
    const Tensor a = other.dA.contiguous();
    const Tensor b = expected.dA.contiguous();
    EXPECT_NE(std::memcmp(a.raw(), b.raw(), a.nbytes()), 0);
  }
}

// A GPU has a kernel of its own for channels side by side.
TEST(SelectiveScanBackward, CheckpointsOfAnyLayoutAreTheSame) {
  for (Options o : sizes_of_a_gpu()) {
    if (!o.channel_last || o.positions || (o.batch > 33 && test_device().kind == Device::Kind::cpu)) continue;
    SCOPED_TRACE(describe(o));
    SelectiveScanArgs args = make_args(o, 5);
    args.return_checkpoints = true;
    Context ctx({.threads = 2});
    const Tensor found = testing::run(ctx, selective_scan, args).checkpoints;
    for (Tensor* t : {&args.u, &args.delta, &args.z}) *t = t->contiguous();
    const Tensor expected = testing::run(ctx, selective_scan, args).checkpoints;
    ASSERT_TRUE(found.defined());
    expect_close(found, expected, 1e-5, "checkpoints");
  }
}

TEST(SelectiveScanBackward, CheckpointsGoToTheirDestination) {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    Options o = random_options(seed);
    o.length = 30 * static_cast<std::int64_t>(seed % 6);
    SCOPED_TRACE(describe(o));
    Args args = make_backward(o, seed);
    const Args expected = run(args);
    SelectiveScanArgs forward = args.forward;
    const Tensor& u = forward.u;
    const bool complex = forward.A.dtype() == DType::c64;
    // However rows are cut into sequences, the shape is one.
    forward.checkpoints = Tensor::zeros(
        selective_scan_checkpoints_shape(u.shape(), forward.A.size(1), complex, test_device().kind),
        forward.A.dtype());
    Context ctx({.threads = 3});
    const SelectiveScanResult result = testing::run(ctx, selective_scan, forward);
    EXPECT_EQ(result.checkpoints.shape(), forward.checkpoints.shape());
    args.checkpoints = forward.checkpoints;
    expect_same_gradients(run(args), expected);
    if (!o.sequences && u.numel() > 0 && u.size(2) > 32 && forward.A.size(1) > 0) {
      SelectiveScanArgs own = forward;
      own.checkpoints = {};
      own.return_checkpoints = true;
      expect_same_bits(testing::run(ctx, selective_scan, own).checkpoints, forward.checkpoints);
    }
  }
}

TEST(SelectiveScanBackward, EachGradientAloneIsTheSame) {
  for (const bool constant : {false, true}) {
    Options o = {.channels = 19, .length = 70, .d_state = 6, .skip = true, .gate = true, .bias = true};
    o.constant_b = o.constant_c = constant;
    const Args args = make_backward(o, 3);
    for (const ScanPath path : {ScanPath::reference, fast_path()}) {
      Args all = args;
      all.forward.path = path;
      const Args expected = run(all);
      for (const auto& [name, member] : gradients()) {
        SCOPED_TRACE(name);
        Args alone = {.forward = all.forward, .dout = all.dout, .dlast_state = all.dlast_state};
        alone.*member = all.*member;
        const Args found = run(alone);
        expect_same_bits(found.*member, expected.*member);
      }
    }
  }
}

TEST(SelectiveScanBackward, InitialGradientMayBeTheLastOne) {
  for (const ScanPath path : {ScanPath::reference, fast_path()}) {
    Args args = make_backward({.channels = 20, .length = 70, .d_state = 5, .initial = true}, 12);
    args.forward.path = path;
    const Args expected = run(args);
    Args found = with_own_gradients(args);
    found.dlast_state = args.dlast_state.clone();
    found.dinitial_state = found.dlast_state;
    Context ctx;
    testing::run(ctx, selective_scan_backward, found);
    expect_same_bits(found.dinitial_state, expected.dinitial_state);
    expect_same_bits(found.du, expected.du);
  }
}

// Back-propagation through time over two segments equals that over the whole.
TEST(SelectiveScanBackward, StatesCarryGradientsOverSegments) {
  for (const bool complex : {false, true}) {
    Options o = {.batch = 2, .channels = 12, .length = 90, .d_state = 6};
    o.complex = complex;
    o.skip = o.softplus = o.initial = true;
    const Args args = make_backward(o, 3);
    const Args whole = run(args);
    const std::int64_t parts = complex ? 2 : 1;
    for (const std::int64_t at : {0, 1, 33, 64, 90}) {
      SCOPED_TRACE(at);
      const auto part = [&](std::int64_t begin, std::int64_t end) {
        Args a = with_own_gradients(args);
        for (Tensor* t : {&a.forward.u, &a.forward.delta, &a.dout, &a.du, &a.ddelta})
          *t = t->slice(2, begin, end);
        for (Tensor* t : {&a.forward.B, &a.forward.C, &a.dB, &a.dC})
          *t = t->slice(3, parts * begin, parts * end);
        return a;
      };
      Context ctx;
      Args first = part(0, at);
      Args second = part(at, 90);
      first.forward.return_last_state = true;
      second.forward.initial_state = testing::run(ctx, selective_scan, first.forward).last_state;
      testing::run(ctx, selective_scan_backward, second);
      first.dlast_state = second.dinitial_state;
      first.dA = second.dA;  // both add
      first.dD = second.dD;
      testing::run(ctx, selective_scan_backward, first);
      const auto close = [&](const Tensor& a, const Tensor& b, const char* name) {
        expect_close(a, b, 1e-6, kGradientPrecision, name);
      };
      close(first.du, whole.du.slice(2, 0, at), "du");
      close(second.du, whole.du.slice(2, at, 90), "du");
      close(first.ddelta, whole.ddelta.slice(2, 0, at), "ddelta");
      close(second.dB, whole.dB.slice(3, parts * at, parts * 90), "dB");
      close(first.dC, whole.dC.slice(3, 0, parts * at), "dC");
      close(first.dinitial_state, whole.dinitial_state, "dinitial_state");
      close(first.dA, whole.dA, "dA");
      close(first.dD, whole.dD, "dD");
    }
  }
}

TEST(SelectiveScanBackward, PackedSequencesEqualSeparateCalls) {
  for (const bool reverse : {false, true}) {
    Options o = {.channels = 20, .length = 83, .gate = true, .softplus = true, .reverse = reverse};
    o.initial = true;
    o.sequences = 3;
    const Args args = make_backward(o, 4);
    const Args packed = run(args);
    const std::int64_t count = args.forward.cu_seqlens.size(0) - 1;
    ASSERT_GT(count, 5);
    for (std::int64_t i = 0; i < count; ++i) {
      SCOPED_TRACE(i);
      const std::int64_t begin = args.forward.cu_seqlens.data<std::int64_t>()[i];
      const std::int64_t end = args.forward.cu_seqlens.data<std::int64_t>()[i + 1];
      Args one = args;
      one.forward.cu_seqlens = {};
      for (Tensor* t :
           {&one.forward.u, &one.forward.delta, &one.forward.z, &one.dout, &one.du, &one.ddelta, &one.dz})
        *t = t->slice(2, begin, end);
      for (Tensor* t : {&one.forward.B, &one.forward.C, &one.dB, &one.dC}) *t = t->slice(3, begin, end);
      for (Tensor* t : {&one.forward.initial_state, &one.dlast_state, &one.dinitial_state})
        *t = t->slice(0, i, i + 1);
      const Args alone = run(one);
      expect_same_bits(packed.du.slice(2, begin, end), alone.du);
      expect_same_bits(packed.ddelta.slice(2, begin, end), alone.ddelta);
      expect_same_bits(packed.dz.slice(2, begin, end), alone.dz);
      expect_same_bits(packed.dinitial_state.slice(0, i, i + 1), alone.dinitial_state);
      expect_close(packed.dB.slice(3, begin, end), alone.dB, 1e-6, 1e-6, "dB");
    }
  }
}

TEST(SelectiveScanBackward, PaddingHasNoGradient) {
  Options o = {.batch = 2, .channels = 11, .length = 40, .d_state = 5, .skip = true, .gate = true};
  o.sequences = 2;
  Args args = make_backward(o, 5);
  const auto* ids = args.forward.seq_idx.data<std::int32_t>();
  // Whatever stands at padding, it is not looked at.
  for (std::int64_t b = 0; b < 2; ++b)
    for (std::int64_t t = 0; t < 40; ++t)
      if (ids[b * 40 + t] < 0) {
        for (Tensor* x : {&args.forward.u, &args.forward.delta, &args.forward.z, &args.dout})
          x->select(0, b).select(1, t).fill(std::nan(""));
        for (Tensor* x : {&args.forward.B, &args.forward.C}) x->select(0, b).select(2, t).fill(std::nan(""));
      }
  for (const ScanPath path : {ScanPath::reference, fast_path()}) {
    args.forward.path = path;
    const Args found = run(args);
    std::int64_t padding = 0;
    for (std::int64_t b = 0; b < 2; ++b)
      for (std::int64_t t = 0; t < 40; ++t)
        for (const Tensor* x : {&found.du, &found.ddelta, &found.dz, &found.dB, &found.dC}) {
          const Tensor row = x->select(0, b);
          const Tensor at = (row.ndim() == 2 ? row.select(1, t) : row.select(2, t)).contiguous();
          for (std::int64_t i = 0; i < at.numel(); ++i) {
            if (ids[b * 40 + t] < 0) {
              EXPECT_EQ(at.data<float>()[i], 0.0F);
              ++padding;
            } else {
              EXPECT_TRUE(std::isfinite(at.data<float>()[i]));
            }
          }
        }
    EXPECT_GT(padding, 100);
  }
}

// Exponents far outside of the range of f32: decays are 0, and nothing becomes NaN.
TEST(SelectiveScanBackward, DecaysUnderflow) {
  for (const double top : {60.0, 1e4, 1e30}) {
    SCOPED_TRACE(top);
    Args args = make_backward({.channels = 9, .length = 66, .d_state = 5, .initial = true}, 5);
    Rng rng(9);
    args.forward.A = random_tensor(rng, {9, 5}, DType::f32, -top, -top / 100);
    args.forward.delta = random_tensor(rng, {2, 9, 66}, DType::f32, 0.5, 5);
    const Args expected = in_double(args);
    Context ctx;
    testing::run(ctx, selective_scan_backward, expected);
    const Args found = run(args);
    for (const auto& [name, member] : gradients())
      if (found.*member)  // in f32, where what is left of the initial state is 0
        expect_close(found.*member, (expected.*member).to(DType::f32), 1e-6, kGradientPrecision, name);
  }
}

// One channel of one row has a NaN: other channels do not have it, nor dB and dC of other rows and earlier
// tokens (later ones for what comes back from the end).
TEST(SelectiveScanBackward, NotANumberStaysWhereItIs) {
  Args args = make_backward({.batch = 2, .channels = 10, .length = 70, .d_state = 3, .softplus = true}, 8);
  args.forward.u.data<float>()[3 * 70 + 40] = std::numeric_limits<float>::quiet_NaN();
  const Args found = run(args);
  const auto nan_at = [](const Tensor& t, std::initializer_list<std::int64_t> index) {
    std::int64_t at = 0;
    int dim = 0;
    for (const std::int64_t i : index) at += i * t.stride(dim++);
    return std::isnan(t.data<float>()[at]);
  };
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t t = 0; t < 70; ++t) {
      for (std::int64_t c = 0; c < 10; ++c) {
        if (b == 1 || c != 3) {
          EXPECT_FALSE(nan_at(found.du, {b, c, t}));
          EXPECT_FALSE(nan_at(found.ddelta, {b, c, t}));
        }
      }
      for (std::int64_t n = 0; n < 3; ++n) {
        EXPECT_EQ(nan_at(found.dC, {b, 0, n, t}), b == 0 && t >= 40) << b << " " << n << " " << t;
        EXPECT_EQ(nan_at(found.dB, {b, 0, n, t}), b == 0 && t == 40) << b << " " << n << " " << t;
      }
    }
  }
  for (std::int64_t c = 0; c < 10; ++c) EXPECT_EQ(nan_at(found.dA, {c, 0}), c == 3);
}

TEST(SelectiveScanBackward, GradientsHaveDtypesOfTheirOwn) {
  Args args = make_backward({.channels = 21, .length = 40, .dtype = DType::bf16, .gate = true}, 6);
  Args expected = args;
  for (Tensor Args::*member : {&Args::du, &Args::ddelta, &Args::dz, &Args::dB, &Args::dC})
    expected.*member = (args.*member).to(DType::f32);
  expected = run(expected);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (Tensor Args::*member : {&Args::du, &Args::ddelta, &Args::dz, &Args::dB, &Args::dC})
      args.*member = (args.*member).to(dtype);
    const Args found = run(args);
    for (Tensor Args::*member : {&Args::du, &Args::ddelta, &Args::dz, &Args::dB, &Args::dC})
      expect_same_bits(found.*member, (expected.*member).to(dtype));
  }
}

TEST(SelectiveScanBackward, OneGroupOfBServesThoseOfC) {
  Context ctx;
  for (const bool three_dimensions : {false, true}) {
    Args args = make_backward({.channels = 10, .length = 40, .groups = 5}, 1);
    args.forward.B = args.forward.B.slice(1, 0, 1);
    args.dB = args.dB.slice(1, 0, 1);
    if (three_dimensions) {
      args.forward.B = args.forward.B.squeeze(1);
      args.dB = args.dB.squeeze(1);
    }
    const Args expected = in_double(args);
    testing::run(ctx, selective_scan_backward, expected);
    for (const ScanPath path : {ScanPath::reference, fast_path()}) {
      args.forward.path = path;
      const Args found = run(args);
      expect_close(found.dB, expected.dB, 1e-6, kGradientPrecision, "dB");
      expect_close(found.dC, expected.dC, 1e-6, kGradientPrecision, "dC");
    }
  }
}

TEST(SelectiveScanBackward, Paths) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  Context ctx;
  Args args = make_backward({}, 1);
  testing::run(ctx, selective_scan_backward, args);
  EXPECT_EQ(ctx.backend(), concat("selective_scan_backward: simd (", simd_target(), ")"));
  args.du = args.du.to(DType::f64);
  testing::run(ctx, selective_scan_backward, args);
  EXPECT_EQ(ctx.backend(), "selective_scan_backward: reference");
  args.du = {};
  ctx.set_reference(true);
  testing::run(ctx, selective_scan_backward, args);
  EXPECT_EQ(ctx.backend(), "selective_scan_backward: reference");
}

// ---- choices

TEST(SelectiveScanBackward, Division) {
  const scan::Division model = scan::divide_backward(2, 1, 1536);
  EXPECT_EQ(model.block, 64);
  EXPECT_EQ(model.blocks, 24);
  EXPECT_EQ(model.parts, 2);
  EXPECT_EQ(model.deep, 2);
  EXPECT_EQ(model.segments, 12);
  EXPECT_EQ(scan::divide_backward(1, 1, 5120).parts, 1);
  EXPECT_LE(scan::divide_backward(1, 1, 51200).segments, 32);
  for (const std::int64_t rows : {0, 1, 3, 100})
    for (const std::int64_t groups : {1, 3, 64})
      for (const std::int64_t channels : {0, 1, 63, 64, 65, 1000}) {
        SCOPED_TRACE(concat(rows, " ", groups, " ", channels));
        const scan::Division d = scan::divide_backward(rows, groups, channels);
        EXPECT_GE(d.blocks * d.block, channels);
        EXPECT_GE(d.segments * d.deep, d.blocks);
        EXPECT_LT((d.segments - 1) * d.deep, d.blocks);
        EXPECT_GE(d.parts, 1);
        EXPECT_LE(d.parts, std::max<std::int64_t>(rows, 1));
      }
  EXPECT_EQ(scan::choose_backward_steps(16, false), 32);
  EXPECT_EQ(scan::choose_backward_steps(100'000, false), 8);
  EXPECT_EQ(scan::choose_backward_steps(0, true), 32);
}

TEST(SelectiveScanBackward, Tiles) {
  scan::Problem p;
  p.seq_idx = Tensor::from(std::vector<std::int32_t>{-1, 4, 4, -1, 4, 4, 4, 2, -1, 2, 4}, {1, 11});
  p.rows = {{.length = 11}, {.length = 0}};
  const auto tiles = scan::cut_into_tiles(p, 4);
  ASSERT_EQ(tiles.size(), 2U);
  EXPECT_TRUE(tiles[1].empty());
  struct Expected {
    std::int64_t begin, length;
    bool restart, padded;
    std::int64_t checkpoint;
  };
  const std::vector<Expected> expected = {
      {0, 4, false, true, -1}, {4, 3, false, false, 0}, {7, 3, true, true, -1}, {10, 1, true, false, -1}};
  ASSERT_EQ(tiles[0].size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(tiles[0][i].begin, expected[i].begin);
    EXPECT_EQ(tiles[0][i].length, expected[i].length);
    EXPECT_EQ(tiles[0][i].restart, expected[i].restart);
    EXPECT_EQ(tiles[0][i].padded, expected[i].padded);
    EXPECT_EQ(tiles[0][i].checkpoint, expected[i].checkpoint);
  }
}

TEST(SelectiveScanBackward, RefusesWhatDoesNotFit) {
  if (testing::on_gpu()) GTEST_SKIP() << "of the CPU";
  const auto with = [](auto change) -> std::string {
    Options o = {
        .batch = 2, .channels = 6, .length = 7, .d_state = 4, .skip = true, .gate = true, .bias = true};
    Args args = make_backward(o, 1);
    change(args);
    Context ctx;
    try {
      testing::run(ctx, selective_scan_backward, args);
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::invalid_argument);
      return error.what();
    }
    return "no error";
  };
  const auto t = [](const Dims& shape, DType dtype = DType::f32) { return Tensor::zeros(shape, dtype); };
  EXPECT_EQ(with([](Args&) {}), "no error");
  EXPECT_EQ(with([](Args& a) { a.forward.u = {}; }), "[selective_scan] u is absent");
  EXPECT_EQ(with([](Args& a) { a.dout = {}; }), "[selective_scan] dout is absent");
  EXPECT_EQ(with([&](Args& a) {
              a.dout = t({2, 6, 8});
            }),
            "[selective_scan] dout has shape (2, 6, 8), expected (2, 6, 7): as u");
  EXPECT_EQ(with([&](Args& a) {
              a.du = t({2, 6, 7}, DType::i32);
            }),
            "[selective_scan] du has dtype i32, expected f32, bf16, f16 or f64");
  EXPECT_EQ(with([&](Args& a) {
              a.dlast_state = t({1, 6, 4});
            }),
            "[selective_scan] dlast_state has shape (1, 6, 4), expected (2, 6, 4): one state per row");
  EXPECT_EQ(
      with([&](Args& a) {
        a.dinitial_state = t({2, 6, 4}, DType::c64);
      }),
      "[selective_scan] dinitial_state has dtype c64, expected f32, bf16, f16 or f64, as A has dtype f32");
  EXPECT_EQ(with([&](Args& a) {
              a.dB = t({2, 4, 7});
            }),
            "[selective_scan] dB has shape (2, 4, 7), expected (2, 1, 4, 7): as B");
  EXPECT_EQ(with([&](Args& a) {
              a.dC = t({6, 4});
            }),
            "[selective_scan] dC has shape (6, 4), expected (2, 1, 4, 7): as C");
  EXPECT_EQ(with([&](Args& a) {
              a.dA = t({6, 4}, DType::bf16);
            }),
            "[selective_scan] dA has dtype bf16, expected f32 or f64, as A has dtype f32");
  EXPECT_EQ(with([&](Args& a) { a.dD = t({5}); }),
            "[selective_scan] dD has shape (5,), expected (6,): one value per channel");
  EXPECT_EQ(with([&](Args& a) { a.ddelta_bias = t({6}, DType::f16); }),
            "[selective_scan] ddelta_bias has dtype f16, expected f32 or f64");
  EXPECT_EQ(with([](Args& a) { a.forward.z = {}; }), "[selective_scan] dz is given without z");
  EXPECT_EQ(with([](Args& a) { a.forward.D = {}; }), "[selective_scan] dD is given without D");
  EXPECT_EQ(with([](Args& a) { a.forward.delta_bias = {}; }),
            "[selective_scan] ddelta_bias is given without delta_bias");
  EXPECT_EQ(with([](Args& a) { a.ddelta = a.du; }), "[selective_scan] du shares memory with ddelta");
  EXPECT_EQ(with([](Args& a) { a.dz = a.forward.z; }), "[selective_scan] dz shares memory with z");
  EXPECT_EQ(with([](Args& a) { a.dinitial_state = a.dlast_state; }), "no error");
  EXPECT_EQ(
      with([&](Args& a) {
        a.checkpoints = t({1, 4, 6});
      }),
      "[selective_scan] checkpoints has shape (1, 4, 6), expected (0, 4, 6): as selective_scan returned them "
      "for these arguments");
  EXPECT_EQ(with([](Args& a) { a = in_double(a), a.forward.path = ScanPath::simd; }),
            "[selective_scan] the path simd has no f64, expected f32, bf16 and f16 tensors");
}

}  // namespace
}  // namespace krait
