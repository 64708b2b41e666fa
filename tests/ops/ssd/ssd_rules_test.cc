// What ssd promises beyond its numbers: splitting, packing, padding, threads, aliasing, choices, messages.
#include <gtest/gtest.h>

#include "ops/ssd/kernels.h"
#include "ops/ssd/problem.h"
#include "ops/ssd/ssd_cases.h"

namespace krait {
namespace {

using namespace testing;

constexpr SsdSizes kSizes{.rows = 2, .length = 75, .heads = 4, .headdim = 12, .groups = 2, .d_state = 20};

SsdArgs part_of(SsdArgs args, std::int64_t begin, std::int64_t end) {
  for (Tensor* t : {&args.x, &args.dt, &args.B, &args.C, &args.z})
    if (*t) *t = t->slice(1, begin, end);
  return args;
}

TEST(Ssd, SplitWithStateCarriedIsOnePass) {
  Context ctx;
  Rng rng(1);
  for (const SsdPath path : all_paths()) {
    SsdArgs args = plain_case(rng, kSizes);
    args.initial_states = random_tensor(rng, {2, 4, 12, 20});
    args.return_final_states = true;
    args.path = path;
    args.chunk_size = 16;
    const SsdResult whole = run(ctx, ssd, args);
    for (const std::int64_t cut : {0, 1, 16, 40, 75}) {
      SCOPED_TRACE(concat("path ", static_cast<int>(path), " cut at ", cut));
      const Tensor state = args.initial_states.clone();  // carried in place
      SsdArgs carried = args;
      carried.initial_states = carried.final_states = state;
      const Tensor left = run(ctx, ssd, part_of(carried, 0, cut)).out;
      const Tensor right = run(ctx, ssd, part_of(carried, cut, 75)).out;
      expect_close(left, whole.out.slice(1, 0, cut), 1e-5, "left");
      expect_close(right, whole.out.slice(1, cut, 75), 1e-5, "right");
      expect_close(state, whole.final_states, 1e-5, "final_states");
    }
  }
}

TEST(Ssd, PackedIsSeparate) {
  Context ctx;
  Rng rng(2);
  const std::vector<std::int64_t> offsets = {0, 3, 3, 70, 75};
  for (const bool reverse : {false, true}) {
    for (const SsdPath path : fast_paths()) {
      SsdSizes s = kSizes;
      s.rows = 1;
      SsdArgs args = plain_case(rng, s);
      args.initial_states = random_tensor(rng, {4, 4, 12, 20});
      args.return_final_states = true;
      args.reverse = reverse;
      args.path = path;
      args.chunk_size = 16;
      SsdArgs packed = args;
      packed.cu_seqlens = Tensor::from(offsets);
      const SsdResult together = run(ctx, ssd, packed);
      for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
        SCOPED_TRACE(concat("path ", static_cast<int>(path), " reverse ", reverse, " sequence ", i));
        const auto n = static_cast<std::int64_t>(i);
        SsdArgs alone = part_of(args, offsets[i], offsets[i + 1]);
        alone.initial_states = args.initial_states.slice(0, n, n + 1);
        const SsdResult result = run(ctx, ssd, alone);
        expect_same_bits(together.out.slice(1, offsets[i], offsets[i + 1]), result.out, "out");
        expect_same_bits(together.final_states.slice(0, n, n + 1), result.final_states, "final_states");
      }
    }
  }
}

TEST(Ssd, SeqIdxRestartsAndPaddingIsAsIfItWereNotThere) {
  Context ctx;
  Rng rng(3);
  const SsdSizes s{.rows = 1, .length = 9, .heads = 2, .headdim = 5, .groups = 1, .d_state = 6};
  for (const SsdPath path : all_paths()) {
    SCOPED_TRACE(concat("path ", static_cast<int>(path)));
    SsdArgs args = plain_case(rng, s);
    args.D = random_tensor(rng, {2});
    args.initial_states = random_tensor(rng, {1, 2, 5, 6});
    args.return_final_states = true;
    args.path = path;
    SsdArgs padded = args;
    padded.seq_idx = Tensor::from<std::int64_t>({-1, 4, 4, -1, 4, 7, 7, 7, -1}, {1, 9});
    padded.state_positions = Tensor::from<std::int64_t>({0, 3, 4, 8}, {1, 4});
    const SsdResult found = run(ctx, ssd, padded);
    for (const std::int64_t t : {0, 3, 8})
      expect_same_bits(found.out.select(1, t), Tensor::zeros({1, 2, 5}), concat("padding ", t));

    // Tokens 1, 2, 4 with the initial state, then 5, 6, 7 without.
    SsdArgs first = args;
    for (Tensor* t : {&first.x, &first.dt, &first.B, &first.C}) {
      Dims shape = t->shape();
      shape[1] = 3;
      const Tensor kept = Tensor::empty(shape);
      kept.slice(1, 0, 2).copy_from(t->slice(1, 1, 3));
      kept.slice(1, 2, 3).copy_from(t->slice(1, 4, 5));
      *t = kept;
    }
    const SsdResult left = run(ctx, ssd, first);
    SsdArgs second = part_of(args, 5, 8);
    second.initial_states = {};
    const SsdResult right = run(ctx, ssd, second);
    expect_close(found.out.slice(1, 1, 3), left.out.slice(1, 0, 2), 1e-6, "tokens 1 and 2");
    expect_close(found.out.slice(1, 4, 5), left.out.slice(1, 2, 3), 1e-6, "token 4");
    expect_close(found.out.slice(1, 5, 8), right.out, 1e-6, "tokens 5 to 7");
    expect_close(found.final_states, right.final_states, 1e-6, "final_states");
    expect_close(found.states.select(1, 0), args.initial_states, 1e-6, "state before any token");
    expect_close(found.states.select(1, 2), left.final_states, 1e-6, "state after token 4");
    expect_close(found.states.select(1, 3), right.final_states, 1e-6, "state after the last token");
  }
}

TEST(Ssd, StatesGoToTheirDestination) {
  Context ctx;
  Rng rng(5);
  for (const SsdPath path : all_paths()) {
    SCOPED_TRACE(concat("path ", static_cast<int>(path)));
    SsdArgs args = plain_case(rng, {.rows = 2, .length = 40, .heads = 2, .headdim = 5, .d_state = 6});
    args.path = path;
    args.state_positions = Tensor::from<std::int64_t>({39, 0, 7, 7}, {2, 2});
    const Tensor expected = run(ctx, ssd, args).states;
    // Not contiguous: the two slots have changed places with the heads.
    args.states = Tensor::zeros({2, 2, 2, 5, 6}).transpose(1, 2);
    const SsdResult result = run(ctx, ssd, args);
    expect_same_bits(args.states, expected, "destination");
    expect_same_bits(result.states, expected, "result");
  }
}

TEST(Ssd, RowsWithoutTokensKeepTheirState) {
  Context ctx;
  Rng rng(4);
  for (const SsdPath path : all_paths()) {
    SsdArgs args = plain_case(rng, {.rows = 1, .length = 2, .heads = 2, .headdim = 3, .d_state = 4});
    args.initial_states = random_tensor(rng, {1, 2, 3, 4});
    args.seq_idx = Tensor::from<std::int32_t>({-1, -1}, {1, 2});
    args.return_final_states = true;
    args.path = path;
    const SsdResult result = run(ctx, ssd, args);
    expect_same_bits(result.final_states, args.initial_states, "final_states");
    args.initial_states = {};
    expect_same_bits(run(ctx, ssd, args).final_states, Tensor::zeros({1, 2, 3, 4}), "without initial_states");
  }
}

TEST(Ssd, ReverseIsTheFlippedSequence) {
  Context ctx;
  Rng rng(5);
  SsdArgs args = plain_case(rng, kSizes);
  args.return_final_states = true;
  args.path = chunked_path();
  SsdArgs flipped = args;
  for (Tensor* t : {&flipped.x, &flipped.dt, &flipped.B, &flipped.C}) {
    const Tensor to = Tensor::empty(t->shape());
    for (std::int64_t i = 0; i < 75; ++i) to.select(1, i).copy_from(t->select(1, 74 - i));
    *t = to;
  }
  args.reverse = true;
  const SsdResult reversed = run(ctx, ssd, args);
  const SsdResult forward = run(ctx, ssd, flipped);
  expect_same_bits(reversed.final_states, forward.final_states, "final_states");
  for (std::int64_t i = 0; i < 75; ++i)
    expect_same_bits(reversed.out.select(1, i), forward.out.select(1, 74 - i), concat("token ", i));
}

TEST(Ssd, ThreadsDoNotChangeABit) {
  Rng rng(6);
  for (const SsdPath path : fast_paths()) {
    SsdArgs args =
        plain_case(rng, {.rows = 2, .length = 90, .heads = 10, .headdim = 20, .groups = 2, .d_state = 24});
    args.return_final_states = true;
    args.path = path;
    Context one({.threads = 1});
    const SsdResult expected = run(one, ssd, args);
    for (const int threads : {2, 3, 7}) {
      SCOPED_TRACE(concat("path ", static_cast<int>(path), ", ", threads, " threads"));
      Context ctx({.threads = threads});
      const SsdResult found = run(ctx, ssd, args);
      expect_same_bits(found.out, expected.out, "out");
      expect_same_bits(found.final_states, expected.final_states, "final_states");
    }
  }
}

TEST(Ssd, StateInPlaceWithSeveralRuns) {
  Rng rng(7);
  for (const SsdPath path : all_paths()) {
    SsdArgs args = plain_case(rng, kSizes);
    args.initial_states = random_tensor(rng, {2, 4, 12, 20});
    args.seq_idx = Tensor::zeros({2, 75}, DType::i64);
    for (std::int64_t t = 0; t < 150; ++t) args.seq_idx.data<std::int64_t>()[t] = t % 75 / 10;
    args.return_final_states = true;
    args.path = path;
    Context ctx({.threads = 3});
    const SsdResult apart = run(ctx, ssd, args);
    args.final_states = args.initial_states;
    const SsdResult in_place = run(ctx, ssd, args);
    expect_same_bits(in_place.out, apart.out, "out");
    expect_same_bits(args.initial_states, apart.final_states, "final_states");
  }
}

// Blocks of a GPU share a long sequence: the last of them may replace the state that the first begins with.
TEST(Ssd, StatesLieAnywhere) {
  Context ctx({.threads = 2});
  Rng rng(11);
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const SsdPath path : fast_paths()) {
      SsdArgs args = plain_case(
          rng, {.rows = 1, .length = 6000, .heads = 5, .headdim = 64, .groups = 1, .d_state = 48}, dtype);
      args.dt = random_tensor(rng, args.dt.shape(), DType::f32, 1e-4, 1e-3);
      args.cu_seqlens = Tensor::from<std::int64_t>({0, 40, 40, 300, 5000, 6000});
      args.initial_states = random_tensor(rng, {5, 5, 64, 48}, DType::bf16).to(DType::f32);
      args.return_final_states = true;
      args.path = path;
      const SsdResult expected = run(ctx, ssd, args);
      const auto expect_same = [&](const SsdArgs& given, const std::string& what) {
        SCOPED_TRACE(concat(name_of(dtype), " ", what));
        const SsdResult found = run(ctx, ssd, given);
        expect_same_bits(found.out, expected.out, "out");
        expect_same_bits(found.final_states, expected.final_states, "final_states");
      };
      SsdArgs in_place = args;
      in_place.initial_states = in_place.final_states = args.initial_states.clone();
      expect_same(in_place, "in place");
      for (int layout = 1; layout < 4; ++layout) {
        SsdArgs apart = args;
        apart.initial_states = laid_out(args.initial_states, layout);
        apart.final_states = laid_out(Tensor::zeros({5, 5, 64, 48}), layout);
        expect_same(apart, concat("layout ", layout));
      }
      SsdArgs narrow = args;
      narrow.initial_states = args.initial_states.to(DType::bf16);
      expect_same(narrow, "initial states in bf16");
    }
  }
}

TEST(Ssd, ContextMayAskForTheReference) {
  if (on_gpu()) GTEST_SKIP();
  Rng rng(8);
  Context ctx({.reference = true});
  const SsdArgs args = plain_case(rng, kSizes);
  (void)run(ctx, ssd, args);
  EXPECT_EQ(ctx.backend(), "ssd: reference");
  ctx.set_reference(false);
  (void)run(ctx, ssd, args);
  EXPECT_EQ(ctx.backend(), concat("ssd: chunked (", simd_target(), ")"));
}

TEST(Ssd, OnAGpuThereAreNoPathsByName) {
  if (!on_gpu()) GTEST_SKIP();
  Rng rng(10);
  Context& gpu = gpu_context();
  SsdArgs args = plain_case(rng, kSizes);
  for (Tensor* t : {&args.x, &args.dt, &args.A, &args.B, &args.C}) *t = gpu.to_device(*t);
  args.path = SsdPath::chunked;
  const std::string expected =
      concat("[ssd] the paths by name are the CPU's, expected SsdPath::automatic on ", name_of(gpu.device()));
  EXPECT_EQ(message_of([&] { (void)ssd(gpu, args); }), expected);
  args.path = SsdPath::automatic;
  const Tensor on_device = args.dt;
  args.dt = Tensor::zeros(args.dt.shape());
  EXPECT_NE(message_of([&] { (void)ssd(gpu, args); }), "");
  args.dt = on_device;
  args.x = gpu.to_device(Tensor::zeros(args.x.shape(), DType::f64));
  EXPECT_EQ(message_of([&] { (void)ssd(gpu, args); }),
            "[ssd] x has dtype f64, expected f32, bf16 or f16 on a GPU");
}

TEST(ChooseWalk, CutsWhatWouldNotFillAGpu) {
  using ssd_detail::choose_walk;
  EXPECT_EQ(choose_walk(8, 4096, 80, 64), 4096);  // 1,280 blocks as it is
  EXPECT_EQ(choose_walk(1, 65536, 80, 64), 16384);
  EXPECT_EQ(choose_walk(1, 4096, 1, 16), 128);  // never into shorter ones
  EXPECT_EQ(choose_walk(1, 100, 1, 16), 100);
  EXPECT_EQ(choose_walk(0, 0, 0, 0), 1);
}

TEST(ChooseChunked, WholeChunks) {
  using ssd_detail::choose_chunked;
  EXPECT_EQ(choose_chunked(8, 4096, 80, 64), 4096);
  EXPECT_EQ(choose_chunked(16, 2048, 24, 64), 2048);
  EXPECT_EQ(choose_chunked(1, 2048, 80, 64), 256);
  EXPECT_EQ(choose_chunked(1, 65536, 80, 64), 4416);
  EXPECT_EQ(choose_chunked(1, 4096, 1, 64), 256);
  EXPECT_EQ(choose_chunked(1, 70, 1, 64), 128);
  EXPECT_EQ(choose_chunked(0, 0, 0, 0), 64);
}

TEST(SuitsTensorCores, SixteenBitRowsOfWholeVectors) {
  Rng rng(12);
  const TokenRuns runs = cut_into_runs(2, 40, {}, {}, {}, false);
  const TokenRuns with_states =
      cut_into_runs(2, 40, {}, {}, Tensor::from<std::int64_t>({3, 4}, {2, 1}), false);
  const auto suits = [&](const auto& change) {
    SsdArgs a = plain_case(
        rng, {.rows = 2, .length = 40, .heads = 2, .headdim = 64, .groups = 1, .d_state = 128}, DType::bf16);
    ssd_detail::Problem p{.x = a.x, .dt = a.dt, .A = a.A, .B = a.B, .C = a.C, .runs = &runs};
    change(p);
    return ssd_detail::suits_tensor_cores(p);
  };
  using ssd_detail::Problem;
  EXPECT_TRUE(suits([](Problem&) {}));
  EXPECT_TRUE(suits([](Problem& p) { p.B = p.C = p.B.slice(3, 16, 64); }));
  EXPECT_FALSE(suits([](Problem& p) { p.x = p.x.to(DType::f32); }));
  EXPECT_FALSE(suits([](Problem& p) { p.C = p.C.to(DType::f16); }));
  EXPECT_FALSE(suits([](Problem& p) { p.x = p.x.slice(3, 0, 32); }));
  EXPECT_FALSE(suits([](Problem& p) { p.B = p.C = p.B.slice(3, 1, 65); }));
  EXPECT_FALSE(suits([](Problem& p) { p.B = p.C = p.B.slice(3, 0, 40); }));
  EXPECT_FALSE(suits([](Problem& p) { p.out = p.x.transpose(2, 3).contiguous().transpose(2, 3); }));
  EXPECT_FALSE(suits([](Problem& p) { p.discrete = true; }));
  EXPECT_FALSE(suits([&](Problem& p) { p.runs = &with_states; }));
}

TEST(SuitsTensorCores, BackwardHasNoGateAndDByHead) {
  Rng rng(13);
  const TokenRuns runs = cut_into_runs(2, 40, {}, {}, {}, false);
  const auto suits = [&](const auto& change) {
    SsdArgs a = plain_case(
        rng, {.rows = 2, .length = 40, .heads = 2, .headdim = 64, .groups = 1, .d_state = 128}, DType::bf16);
    ssd_detail::BackwardProblem b{
        .forward = {.x = a.x, .dt = a.dt, .A = a.A, .B = a.B, .C = a.C, .runs = &runs},
        .dout = a.x,
        .dx = a.x};
    change(b);
    return ssd_detail::suits_tensor_cores(b);
  };
  using ssd_detail::BackwardProblem;
  const Tensor by_head = Tensor::zeros({2});
  EXPECT_TRUE(suits([](BackwardProblem&) {}));
  EXPECT_TRUE(suits([&](BackwardProblem& b) {
    b.forward.D = by_head.unsqueeze(1).expand({2, 64});
    b.dD = by_head;
  }));
  EXPECT_TRUE(suits([](BackwardProblem& b) { b.dx = {}; }));
  EXPECT_FALSE(suits([](BackwardProblem& b) { b.forward.D = Tensor::zeros({2, 64}); }));
  EXPECT_FALSE(suits([](BackwardProblem& b) { b.forward.z = b.dout; }));
  EXPECT_FALSE(suits([](BackwardProblem& b) { b.dout = b.dout.to(DType::f32); }));
  EXPECT_FALSE(suits([](BackwardProblem& b) { b.dx = b.dx.to(DType::f32); }));
}

TEST(ChooseParts, EnoughBlocksAndNoMoreThanHeads) {
  using ssd_detail::choose_parts;
  EXPECT_EQ(choose_parts(512, 80, 256), 1);
  EXPECT_EQ(choose_parts(32, 80, 256), 8);
  EXPECT_EQ(choose_parts(1, 24, 256), 24);
  EXPECT_EQ(choose_parts(0, 0, 256), 1);
}

TEST(ChooseSsd, ShortSequencesAreRecurrent) {
  EXPECT_EQ(choose_ssd(1, 64, 128).path, SsdPath::recurrent);
  EXPECT_EQ(choose_ssd(15, 64, 128).path, SsdPath::recurrent);
  EXPECT_EQ(choose_ssd(16, 64, 128).path, SsdPath::chunked);
  EXPECT_EQ(choose_ssd(4096, 64, 128).path, SsdPath::chunked);
  EXPECT_EQ(choose_ssd(4096, 64, 128).chunk_size, 64);
  EXPECT_EQ(choose_ssd(4096, 64, 16).chunk_size, 32);
  EXPECT_EQ(choose_ssd(256, 64, 128).chunk_size, 256);  // a single chunk has no states to carry
  EXPECT_EQ(choose_ssd(256, 64, 64).chunk_size, 64);
  for (const std::int64_t length : {0, 1, 17, 100000})
    for (const std::int64_t headdim : {0, 1, 64, 512})
      for (const std::int64_t d_state : {0, 1, 16, 256}) {
        const SsdChoice choice = choose_ssd(length, headdim, d_state);
        EXPECT_GE(choice.chunk_size, 1);
        EXPECT_LE(choice.chunk_size, ssd_detail::kMaxChunk);
        EXPECT_NE(choice.path, SsdPath::automatic);
      }
}

TEST(ChooseHeadsPerBlock, SharesWorkAndFitsTheCache) {
  using ssd_detail::choose_heads_per_block;
  EXPECT_EQ(choose_heads_per_block(1, 24, 64 * 128, 1), 16);  // the states fill the cache
  EXPECT_EQ(choose_heads_per_block(1, 24, 64 * 128, 2), 12);  // half for each thread
  EXPECT_EQ(choose_heads_per_block(1, 24, 64 * 128, 64), 1);  // never less than one head
  EXPECT_EQ(choose_heads_per_block(8, 24, 16 * 16, 2), 24);   // sequences enough for all threads
  EXPECT_EQ(choose_heads_per_block(1, 24, 1024 * 1024, 1), 1);
  EXPECT_GE(choose_heads_per_block(0, 0, 0, 2), 1);
}

TEST(Ssd, MessagesNameWhatWasFound) {
  Context ctx;
  Rng rng(9);
  const SsdArgs good =
      plain_case(rng, {.rows = 2, .length = 7, .heads = 4, .headdim = 3, .groups = 2, .d_state = 5});
  const auto message = [&](const auto& change) {
    SsdArgs args = good;
    change(args);
    return message_of([&] { (void)run(ctx, ssd, args); });
  };
  const auto zeros = [](const Dims& shape, DType dtype = DType::f32) { return Tensor::zeros(shape, dtype); };
  EXPECT_EQ(message([&](SsdArgs& a) { a.A = {}; }), "[ssd] x, dt, A, B and C must be given");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.x = zeros({2, 7, 4});
            }),
            "[ssd] x has shape (2, 7, 4), expected (B, L, H, P)");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.x = zeros({2, 7, 4, 3}, DType::i64);
            }),
            "[ssd] x has dtype i64, expected f32, f64, bf16 or f16");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.dt = zeros({2, 7, 3});
            }),
            "[ssd] dt has shape (2, 7, 3), expected (2, 7, 4): one value for each token and head");
  EXPECT_EQ(message([&](SsdArgs& a) { a.A = zeros({5}); }),
            "[ssd] A has shape (5,), expected (4,): one value for each head");
  EXPECT_EQ(message([&](SsdArgs& a) { a.A = zeros({4}, DType::f64); }),
            "[ssd] A has dtype f64 beside x of f32: f64 needs x in f64 too");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.B = zeros({2, 7, 5});
            }),
            "[ssd] B has shape (2, 7, 5), expected (2, 7, G, N)");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.B = a.C = zeros({2, 7, 3, 5});
            }),
            "[ssd] B has 3 groups, which do not divide the 4 heads");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.C = zeros({2, 7, 2, 6});
            }),
            "[ssd] C has shape (2, 7, 2, 6), expected (2, 7, 2, 5): as B");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.D = zeros({4, 2});
            }),
            "[ssd] D has shape (4, 2), expected (4,) or (4, 3)");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.z = zeros({2, 7, 4, 4});
            }),
            "[ssd] z has shape (2, 7, 4, 4), expected (2, 7, 4, 3): as x");
  EXPECT_EQ(message([&](SsdArgs& a) { a.dt_bias = zeros({3}); }),
            "[ssd] dt_bias has shape (3,), expected (4,): one value for each head");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.dt_limit = {0.5F, 0.1F};
            }),
            "[ssd] dt_limit is (0.5, 0.1), expected low <= high");
  EXPECT_EQ(message([&](SsdArgs& a) { a.chunk_size = -1; }),
            "[ssd] chunk_size is -1, expected 0 (automatic) or more");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.initial_states = zeros({1, 4, 3, 5});
            }),
            "[ssd] initial_states has shape (1, 4, 3, 5), expected (2, 4, 3, 5): one state for each sequence "
            "and head");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.final_states = zeros({2, 4, 3, 5}, DType::bf16);
            }),
            "[ssd] final_states has dtype bf16, expected f32");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.out = zeros({2, 7, 4, 3}, DType::bf16);
            }),
            "[ssd] out has dtype bf16, expected f32 as x");
  EXPECT_EQ(message([&](SsdArgs& a) { a.out = a.x; }), "[ssd] out overlaps x");
  EXPECT_EQ(message([&](SsdArgs& a) {
              const Tensor states = zeros({3, 4, 3, 5});
              a.initial_states = states.slice(0, 0, 2);
              a.final_states = states.slice(0, 1, 3);
            }),
            "[ssd] final_states overlaps initial_states without being the same view");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.seq_idx = zeros({2, 6}, DType::i32);
            }),
            "[ssd] seq_idx has shape (2, 6), expected (2, 7)");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.cu_seqlens = Tensor::from<std::int64_t>({0, 7});
            }),
            "[ssd] cu_seqlens needs a batch of 1, found 2");
  EXPECT_EQ(message([&](SsdArgs& a) { a.states = a.x; }),
            "[ssd] states is given without state_positions, expected both");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a.state_positions = Tensor::from<std::int64_t>({0, -1}, {2, 1});
            }),
            "[ssd] state_positions[1, 0] is -1, expected 0 to 6");
  EXPECT_EQ(message([&](SsdArgs& a) {
              a = in_f64(a);
              a.path = SsdPath::chunked;
            }),
            "[ssd] the path chunked takes f32, bf16 or f16, x has dtype f64");
}

}  // namespace
}  // namespace krait
