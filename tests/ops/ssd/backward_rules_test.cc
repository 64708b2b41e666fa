// What ssd_backward promises beyond its numbers: splitting, threads, aliasing, absent destinations, choices,
// messages.
#include <gtest/gtest.h>

#include "ops/ssd/backward.h"
#include "ops/ssd/backward_cases.h"
#include "ops/ssd/kernels.h"

namespace krait {
namespace {

using namespace testing;

constexpr SsdSizes kSizes{.rows = 2, .length = 75, .heads = 4, .headdim = 12, .groups = 2, .d_state = 20};

// A case with everything that the forward takes.
SsdArgs full_case(Rng& rng, const SsdSizes& s) {
  SsdArgs f = plain_case(rng, s);
  f.D = random_tensor(rng, {s.heads});
  f.z = random_tensor(rng, f.x.shape());
  f.dt_bias = random_tensor(rng, {s.heads});
  f.dt_softplus = true;
  f.initial_states = random_tensor(rng, state_shape(f));
  f.chunk_size = 16;
  return f;
}

// The same call with destinations of its own.
SsdBackwardArgs with_own_destinations(const SsdBackwardArgs& args) {
  SsdBackwardArgs copy = args;
  for (const NamedGradient& g : gradients_of_ssd())
    if (args.*g.tensor) copy.*g.tensor = (args.*g.tensor).clone();
  return copy;
}

void expect_same_gradients(const SsdBackwardArgs& found, const SsdBackwardArgs& expected) {
  for (const NamedGradient& g : gradients_of_ssd())
    if (found.*g.tensor) expect_same_bits(found.*g.tensor, expected.*g.tensor, g.name);
}

TEST(SsdBackward, ThreadsDoNotChangeABit) {
  Rng rng(1);
  // A batch of many runs, and one whose heads have to be divided to give every thread work.
  for (const SsdSizes& s :
       {SsdSizes{.rows = 5, .length = 40, .heads = 6, .headdim = 12, .groups = 2, .d_state = 20},
        SsdSizes{.rows = 1, .length = 90, .heads = 20, .headdim = 20, .groups = 1, .d_state = 24}}) {
    const SsdBackwardArgs args = backward_case(rng, full_case(rng, s));
    const SsdBackwardArgs expected = with_own_destinations(args);
    Context one({.threads = 1});
    run(one, ssd_backward, expected);
    for (const int threads : {2, 3, 7}) {
      SCOPED_TRACE(concat("batch ", s.rows, ", ", threads, " threads"));
      Context ctx({.threads = threads});
      const SsdBackwardArgs found = with_own_destinations(args);
      run(ctx, ssd_backward, found);
      expect_same_gradients(found, expected);
    }
  }
}

TEST(SsdBackward, WhatIsAbsentChangesNothingElse) {
  Context ctx;
  Rng rng(2);
  for (const SsdPath path : {SsdPath::reference, chunked_path()}) {
    SsdBackwardArgs args = backward_case(rng, full_case(rng, kSizes));
    args.forward.path = path;
    const SsdBackwardArgs all = with_own_destinations(args);
    run(ctx, ssd_backward, all);
    for (const NamedGradient& alone : gradients_of_ssd()) {
      SCOPED_TRACE(concat("path ", static_cast<int>(path), ", only ", alone.name));
      SsdBackwardArgs one = args;
      for (const NamedGradient& g : gradients_of_ssd()) one.*g.tensor = {};
      one.*alone.tensor = (args.*alone.tensor).clone();
      run(ctx, ssd_backward, one);
      expect_same_gradients(one, all);
    }
    SsdBackwardArgs none = args;
    for (const NamedGradient& g : gradients_of_ssd()) none.*g.tensor = {};
    run(ctx, ssd_backward, none);
  }
}

TEST(SsdBackward, ParameterGradientsAreAddedTo) {
  Context ctx;
  Rng rng(3);
  for (const SsdPath path : {SsdPath::reference, chunked_path()}) {
    SsdBackwardArgs args = backward_case(rng, full_case(rng, kSizes));
    args.forward.path = path;
    const SsdBackwardArgs once = with_own_destinations(args);
    for (const NamedGradient& g : gradients_of_ssd())
      if (g.added) (once.*g.tensor).fill(0.0);
    run(ctx, ssd_backward, once);
    const SsdBackwardArgs before = with_own_destinations(args);
    run(ctx, ssd_backward, args);
    run(ctx, ssd_backward, args);
    for (const NamedGradient& g : gradients_of_ssd()) {
      if (!g.added) {
        expect_same_bits(args.*g.tensor, once.*g.tensor, g.name);
        continue;
      }
      const Tensor expected = (before.*g.tensor).clone();
      for (std::int64_t i = 0; i < expected.numel(); ++i)
        expected.data<float>()[i] += 2.0F * (once.*g.tensor).data<float>()[i];
      expect_close(args.*g.tensor, expected, 0.0, 1e-6, g.name);
    }
  }
}

// Two halves, the gradient of the state between them handed on in place: truncated back-propagation with
// nothing truncated.
TEST(SsdBackward, SplitWithStateGradientCarriedIsOnePass) {
  Context ctx;
  Rng rng(4);
  for (const SsdPath path : {SsdPath::reference, chunked_path()}) {
    SsdBackwardArgs args = backward_case(rng, full_case(rng, kSizes));
    args.forward.path = path;
    const SsdBackwardArgs whole = with_own_destinations(args);
    run(ctx, ssd_backward, whole);
    for (const std::int64_t cut : {0, 1, 16, 40, 75}) {
      SCOPED_TRACE(concat("path ", static_cast<int>(path), " cut at ", cut));
      const auto part_of = [&](std::int64_t begin, std::int64_t end) {
        SsdBackwardArgs part = args;
        SsdArgs& f = part.forward;
        for (Tensor* t :
             {&f.x, &f.dt, &f.B, &f.C, &f.z, &part.dout, &part.dx, &part.ddt, &part.dB, &part.dC, &part.dz})
          *t = t->slice(1, begin, end);
        return part;
      };
      SsdBackwardArgs left = part_of(0, cut);
      SsdBackwardArgs right = part_of(cut, 75);
      SsdArgs first = left.forward;
      first.return_final_states = true;
      right.forward.initial_states = run(ctx, ssd, first).final_states;
      const Tensor carried = args.dfinal_states.clone();
      left.dfinal_states = left.dinitial_states = right.dfinal_states = right.dinitial_states = carried;
      const SsdBackwardArgs sums = with_own_destinations(args);
      for (SsdBackwardArgs* part : {&left, &right}) {
        part->dA = sums.dA;
        part->dD = sums.dD;
        part->ddt_bias = sums.ddt_bias;
      }
      run(ctx, ssd_backward, right);
      run(ctx, ssd_backward, left);
      expect_close(args.dx, whole.dx, 0.0, 1e-5, "dx");
      expect_close(args.ddt, whole.ddt, 0.0, 1e-5, "ddt");
      expect_close(args.dB, whole.dB, 0.0, 1e-5, "dB");
      expect_close(args.dC, whole.dC, 0.0, 1e-5, "dC");
      expect_close(args.dz, whole.dz, 0.0, 1e-5, "dz");
      expect_close(carried, whole.dinitial_states, 0.0, 1e-5, "dinitial_states");
      expect_close(sums.dA, whole.dA, 0.0, 1e-5, "dA");
      expect_close(sums.dD, whole.dD, 0.0, 1e-5, "dD");
      expect_close(sums.ddt_bias, whole.ddt_bias, 0.0, 1e-5, "ddt_bias");
    }
  }
}

TEST(SsdBackward, StateGradientInPlaceWithSeveralRuns) {
  Rng rng(5);
  for (const SsdPath path : {SsdPath::reference, chunked_path()}) {
    SsdArgs f = full_case(rng, kSizes);
    f.seq_idx = Tensor::zeros({2, 75}, DType::i64);
    for (std::int64_t t = 0; t < 150; ++t) f.seq_idx.data<std::int64_t>()[t] = t % 75 / 10;
    f.path = path;
    SsdBackwardArgs args = backward_case(rng, f);
    Context ctx({.threads = 3});
    run(ctx, ssd_backward, args);
    const Tensor apart = args.dinitial_states;
    args.dinitial_states = args.dfinal_states;
    run(ctx, ssd_backward, args);
    expect_same_bits(args.dfinal_states, apart, "dinitial_states");
  }
}

TEST(SsdBackward, PackedIsSeparate) {
  Context ctx;
  Rng rng(6);
  const std::vector<std::int64_t> offsets = {0, 3, 3, 70, 75};
  for (const bool reverse : {false, true}) {
    SsdSizes s = kSizes;
    s.rows = 1;
    SsdArgs f = full_case(rng, s);
    f.reverse = reverse;
    f.cu_seqlens = Tensor::from(offsets);
    f.initial_states = random_tensor(rng, state_shape(f));
    const SsdBackwardArgs together = backward_case(rng, f);
    run(ctx, ssd_backward, together);
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
      SCOPED_TRACE(concat("reverse ", reverse, " sequence ", i));
      const auto n = static_cast<std::int64_t>(i);
      SsdBackwardArgs alone = with_own_destinations(together);
      SsdArgs& a = alone.forward;
      for (Tensor* t : {&a.x, &a.dt, &a.B, &a.C, &a.z, &alone.dout, &alone.dx, &alone.ddt, &alone.dB,
                        &alone.dC, &alone.dz})
        *t = t->slice(1, offsets[i], offsets[i + 1]);
      a.cu_seqlens = {};
      for (Tensor* t : {&a.initial_states, &alone.dfinal_states, &alone.dinitial_states})
        *t = t->slice(0, n, n + 1);
      run(ctx, ssd_backward, alone);
      const auto same = [&](Tensor SsdBackwardArgs::*t, const char* name) {
        expect_close(alone.*t, (together.*t).slice(1, offsets[i], offsets[i + 1]), 0.0, 1e-6, name);
      };
      same(&SsdBackwardArgs::dx, "dx");
      same(&SsdBackwardArgs::ddt, "ddt");
      same(&SsdBackwardArgs::dB, "dB");
      same(&SsdBackwardArgs::dC, "dC");
      same(&SsdBackwardArgs::dz, "dz");
      expect_close(alone.dinitial_states, together.dinitial_states.slice(0, n, n + 1), 0.0, 1e-6,
                   "dinitial_states");
    }
  }
}

TEST(SsdBackward, WithoutTokensOrHeads) {
  Context ctx;
  Rng rng(7);
  for (const SsdPath path : {SsdPath::reference, chunked_path()}) {
    SCOPED_TRACE(concat("path ", static_cast<int>(path)));
    SsdArgs f = plain_case(rng, {.rows = 2, .length = 3, .heads = 2, .headdim = 3, .d_state = 4});
    f.path = path;
    f.seq_idx = Tensor::from<std::int32_t>({-1, -1, -1, -1, -1, -1}, {2, 3});
    const SsdBackwardArgs padding = backward_case(rng, f);
    const Tensor dA = padding.dA.clone();
    run(ctx, ssd_backward, padding);
    expect_same_bits(padding.dinitial_states, padding.dfinal_states, "dinitial_states");
    expect_same_bits(padding.dx, Tensor::zeros({2, 3, 2, 3}), "dx");
    expect_same_bits(padding.ddt, Tensor::zeros({2, 3, 2}), "ddt");
    expect_same_bits(padding.dB, Tensor::zeros({2, 3, 1, 4}), "dB");
    expect_same_bits(padding.dA, dA, "dA");

    SsdArgs headless = plain_case(rng, {.rows = 2, .length = 3, .heads = 0, .headdim = 3, .d_state = 4});
    headless.path = path;
    const SsdBackwardArgs none = backward_case(rng, headless);
    run(ctx, ssd_backward, none);
    expect_same_bits(none.dB, Tensor::zeros({2, 3, 1, 4}), "dB without heads");
    expect_same_bits(none.dC, Tensor::zeros({2, 3, 1, 4}), "dC without heads");
  }
}

TEST(SsdBackward, PathsAsTheForwardTakesThem) {
  if (on_gpu()) GTEST_SKIP();
  Rng rng(8);
  const SsdBackwardArgs args = backward_case(rng, plain_case(rng, kSizes));
  Context ctx({.reference = true});
  const auto backend_of = [&](SsdPath path) {
    SsdBackwardArgs a = args;
    a.forward.path = path;
    run(ctx, ssd_backward, a);
    return ctx.backend();
  };
  const std::string chunked = concat("ssd_backward: chunked (", simd_target(), ")");
  EXPECT_EQ(backend_of(SsdPath::automatic), "ssd_backward: reference");
  EXPECT_EQ(backend_of(SsdPath::chunked), chunked);
  ctx.set_reference(false);
  EXPECT_EQ(backend_of(SsdPath::automatic), chunked);
  EXPECT_EQ(backend_of(SsdPath::recurrent), chunked);
  EXPECT_EQ(backend_of(SsdPath::reference), "ssd_backward: reference");
}

TEST(ChooseBackward, ChunksByCostAndBlocksOfHeads) {
  using ssd_detail::choose_backward;
  // One chunk has no states to carry; where there must be many, the pairs of a large one cost too much.
  EXPECT_EQ(choose_backward(2, 256, 24, 64, 128, 0).chunk_size, 256);
  EXPECT_EQ(choose_backward(1, 4096, 24, 64, 128, 0).chunk_size, 64);
  EXPECT_EQ(choose_backward(1, 4096, 24, 64, 16, 0).chunk_size, 32);
  EXPECT_EQ(choose_backward(1, 300, 24, 64, 128, 0).chunk_size, 160);  // two of one length, not 256 and 44
  EXPECT_EQ(choose_backward(1, 10, 24, 64, 128, 0).chunk_size, 10);
  EXPECT_EQ(choose_backward(1, 4096, 24, 64, 128, 100).chunk_size, 100);
  EXPECT_EQ(choose_backward(1, 4096, 24, 64, 128, 100000).chunk_size, ssd_detail::kMaxChunk);

  EXPECT_EQ(choose_backward(32, 256, 6, 64, 64, 0).heads, 6);        // sequences enough: nothing is divided
  EXPECT_EQ(choose_backward(1, 4096, 24, 64, 128, 0).heads, 3);      // eight blocks of one sequence
  EXPECT_EQ(choose_backward(1, 256, 24, 64, 128, 0).heads, 12);      // two, as large chunks want to be shared
  EXPECT_EQ(choose_backward(1, 1 << 16, 24, 64, 128, 64).heads, 1);  // long: its states alone fill the room
  for (const std::int64_t independent : {0, 1, 100})
    for (const std::int64_t length : {0, 1, 17, 100000})
      for (const std::int64_t size : {0, 1, 64, 512}) {
        const ssd_detail::BackwardCut cut = choose_backward(independent, length, size, size, size, 0);
        EXPECT_GE(cut.chunk_size, 1);
        EXPECT_LE(cut.chunk_size, ssd_detail::kMaxChunk);
        EXPECT_GE(cut.heads, 1);
      }
}

TEST(ChooseBackward, PathByDeviceAndProblem) {
  using ssd_detail::BackwardPath;
  const ssd_detail::BackwardMemory needed{.chunks = 160'000, .warpgroups = 200'000};
  const auto choose = [&](bool suits, int capability, bool products, int memory) {
    return ssd_detail::choose_backward_path(suits, capability, products, memory, needed);
  };
  EXPECT_EQ(choose(true, 90, true, 232'448), BackwardPath::warpgroups);
  EXPECT_EQ(choose(true, 90, false, 232'448), BackwardPath::chunks);  // built for other architectures
  EXPECT_EQ(choose(true, 80, false, 166'912), BackwardPath::chunks);
  EXPECT_EQ(choose(true, 86, false, 101'376), BackwardPath::plain);
  EXPECT_EQ(choose(true, 75, false, 232'448), BackwardPath::plain);
  EXPECT_EQ(choose(false, 90, true, 232'448), BackwardPath::plain);
}

TEST(ChooseBackward, WalksAndPartsOfWarpgroups) {
  using ssd_detail::choose_warpgroup_parts;
  using ssd_detail::choose_warpgroup_walk;
  // Heads enough: no run is cut, and no state is walked twice.
  EXPECT_EQ(choose_warpgroup_walk(8, 4096, 80, 64), 4096);
  EXPECT_EQ(choose_warpgroup_walk(1, 65536, 80, 64), 65536);
  EXPECT_EQ(choose_warpgroup_walk(1, 65536, 24, 128), 65536);
  EXPECT_EQ(choose_warpgroup_walk(1, 65536, 24, 64), 65536);
  // Few heads: long runs are.
  EXPECT_EQ(choose_warpgroup_walk(1, 65536, 12, 64), 6016);
  EXPECT_EQ(choose_warpgroup_walk(1, 16384, 2, 64), 512);
  EXPECT_EQ(choose_warpgroup_walk(1, 8192, 2, 64), 8192);
  EXPECT_EQ(choose_warpgroup_walk(1, 600, 2, 64), 640);
  EXPECT_EQ(choose_warpgroup_walk(1, 70, 1, 64), 128);
  EXPECT_EQ(choose_warpgroup_walk(0, 0, 0, 0), 64);

  EXPECT_EQ(choose_warpgroup_parts(512, 80), 1);   // four waves, the last one nearly full
  EXPECT_EQ(choose_warpgroup_parts(1024, 80), 1);  // eight
  EXPECT_EQ(choose_warpgroup_parts(32, 80), 4);    // one wave of 128 blocks
  EXPECT_EQ(choose_warpgroup_parts(1, 80), 40);
  EXPECT_EQ(choose_warpgroup_parts(0, 0), 1);
  for (const std::int64_t independent : {1, 7, 131, 133, 5000})
    for (const std::int64_t heads : {1, 2, 24, 80, 500}) {
      EXPECT_GE(choose_warpgroup_parts(independent, heads), 1);
      EXPECT_LE(choose_warpgroup_parts(independent, heads), heads);
    }
}

TEST(SsdBackward, MessagesNameWhatWasFound) {
  Context ctx;
  Rng rng(9);
  const SsdArgs forward =
      plain_case(rng, {.rows = 2, .length = 7, .heads = 4, .headdim = 3, .groups = 2, .d_state = 5});
  const SsdBackwardArgs good = backward_case(rng, forward);
  const auto message = [&](const auto& change) {
    SsdBackwardArgs args = good;
    change(args);
    return message_of([&] { run(ctx, ssd_backward, args); });
  };
  const auto zeros = [](const Dims& shape, DType dtype = DType::f32) { return Tensor::zeros(shape, dtype); };
  EXPECT_EQ(message([&](SsdBackwardArgs& a) { a.forward.A = zeros({5}); }),
            "[ssd_backward] A has shape (5,), expected (4,): one value for each head");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) { a.dout = {}; }), "[ssd_backward] dout must be given");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) {
              a.dout = zeros({2, 7, 4, 2});
            }),
            "[ssd_backward] dout has shape (2, 7, 4, 2), expected (2, 7, 4, 3): as x");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) {
              a.dfinal_states = zeros({1, 4, 3, 5});
            }),
            "[ssd_backward] dfinal_states has shape (1, 4, 3, 5), expected (2, 4, 3, 5): one state for each "
            "sequence and head");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) {
              a.ddt = zeros({2, 7, 3});
            }),
            "[ssd_backward] ddt has shape (2, 7, 3), expected (2, 7, 4): as dt");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) {
              a.dz = zeros({2, 7, 4, 3});
            }),
            "[ssd_backward] dz is wanted, but z is not given");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) {
              a.forward.D = zeros({4});
              a.dD = zeros({4, 3});
            }),
            "[ssd_backward] dD has shape (4, 3), expected (4,): as D");
  EXPECT_EQ(
      message([&](SsdBackwardArgs& a) {
        a.dinitial_states = zeros({2, 4, 5, 3});
      }),
      "[ssd_backward] dinitial_states has shape (2, 4, 5, 3), expected (2, 4, 3, 5): one state for each "
      "sequence and head");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) {
              a.dx = zeros({2, 7, 4, 3}, DType::f64);
            }),
            "[ssd_backward] dx has dtype f64 beside x of f32: f64 needs x in f64 too");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) { a.dA = zeros({4}, DType::bf16); }),
            "[ssd_backward] dA has dtype bf16, expected f32: gradients are added to it");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) { a.dx = a.forward.x; }), "[ssd_backward] dx overlaps x");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) { a.dx = a.dout; }), "[ssd_backward] dx overlaps dout");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) { a.dC = a.dB; }), "[ssd_backward] dC overlaps dB");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) {
              const Tensor states = zeros({3, 4, 3, 5});
              a.dfinal_states = states.slice(0, 0, 2);
              a.dinitial_states = states.slice(0, 1, 3);
            }),
            "[ssd_backward] dinitial_states overlaps dfinal_states");
  EXPECT_EQ(message([&](SsdBackwardArgs& a) {
              a = in_f64(a);
              a.forward.path = SsdPath::chunked;
            }),
            "[ssd_backward] the path chunked takes f32, bf16 or f16, x has dtype f64");
  EXPECT_EQ(message([](SsdBackwardArgs&) {}), "");
}

}  // namespace
}  // namespace krait
