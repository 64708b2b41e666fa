// How the forward on a GPU divides chunks among blocks.
#include <gtest/gtest.h>

#include <map>
#include <utility>
#include <vector>

#include "krait/core/error.h"
#include "krait/core/random.h"
#include "ops/ssd/cuda/parts.h"
#include "ops/ssd/kernels.h"
#include "ops/ssd/problem.h"
#include "ops/ssd/ssd_cases.h"

namespace krait {
namespace {

using namespace testing;
using ssd_detail::Division;
using ssd_detail::Part;

// Runs of so many chunks among `blocks`: each chunk has outputs once, from the state before it, and no block
// waits for a later one.
void check_division(const std::vector<int>& runs, int pairs, int blocks) {
  SCOPED_TRACE(concat(runs.size(), " runs, ", pairs, " pairs, ", blocks, " blocks"));
  std::vector<int> first{0};
  for (const int count : runs) first.push_back(first.back() + count);
  const Division division{
      .total = first.back() * pairs, .pairs = pairs, .runs = static_cast<int>(runs.size()), .blocks = blocks};
  const auto of = [&](int run) { return first[static_cast<std::size_t>(run)]; };

  std::map<std::pair<int, int>, std::vector<int>> seen;  // of a unit's chunks, times with outputs
  std::map<int, Part> published;                         // by block
  std::int64_t with_outputs = 0;
  for (int block = 0; block < blocks; ++block) {
    ssd_detail::Parts parts(division, of, block);
    Part part;
    bool waited = false;
    for (int i = 0; parts.next(part); ++i) {
      const int length = runs[static_cast<std::size_t>(part.run)];
      ASSERT_GT(part.count, 0);
      ASSERT_LE(part.begin + part.count, length);
      EXPECT_EQ(part.publishes, i == 0 && part.begin + part.count < length);
      EXPECT_FALSE(waited) << "what waits comes last";
      std::vector<int>& chunks = seen[{part.run, part.pair}];
      chunks.resize(static_cast<std::size_t>(length));
      if (part.outputs) {
        for (int k = 0; k < part.count; ++k) ++chunks[static_cast<std::size_t>(part.begin + k)];
        with_outputs += part.count;
        EXPECT_EQ(part.waits, part.begin > 0);
      }
      if (part.waits) {
        waited = true;
        // The blocks before have all of the unit up to here, in order.
        int at = 0;
        for (int other = part.first_block; other < block; ++other) {
          ASSERT_TRUE(published.count(other));
          const Part& before = published[other];
          EXPECT_EQ(before.run, part.run);
          EXPECT_EQ(before.pair, part.pair);
          EXPECT_EQ(before.begin, at);
          at += before.count;
        }
        EXPECT_EQ(at, part.begin);
      }
      if (part.publishes) published[block] = part;
      // What is computed before all else to be handed on starts where its unit does.
      EXPECT_TRUE(!part.publishes || !part.outputs || part.begin == 0);
    }
  }
  EXPECT_EQ(with_outputs, division.total);
  for (const auto& [unit, chunks] : seen)
    for (const int times : chunks) EXPECT_EQ(times, 1) << "run " << unit.first << ", pair " << unit.second;
}

TEST(SsdParts, EachChunkOnceAndStatesFromBlocksBefore) {
  check_division({64, 64, 64, 64, 64, 64, 64, 64}, 40, 132);
  check_division({32}, 40, 132);
  check_division({1024}, 40, 132);
  check_division({5}, 1, 5);
  check_division({1}, 1, 1);
  check_division({3, 1, 700, 2, 40}, 2, 100);
  Rng rng(1);
  for (int i = 0; i < 200; ++i) {
    std::vector<int> runs(static_cast<std::size_t>(pick(rng, 1, 12)));
    int total = 0;
    for (int& count : runs) total += count = static_cast<int>(pick(rng, 1, i % 3 == 0 ? 60 : 5));
    const int pairs = static_cast<int>(pick(rng, 1, 5));
    check_division(runs, pairs, static_cast<int>(pick(rng, 1, total * pairs)));
  }
}

// Of a unit longer than a range: the state alone first, without what it has forgotten, then all outputs.
TEST(SsdParts, LeavesOutWhatIsForgottenOfAPartForTheStateAlone) {
  const Division division{.total = 100, .pairs = 1, .runs = 1, .blocks = 2};
  const auto of = [](int run) { return run * 100; };
  ssd_detail::Parts parts(division, of, 0);
  parts.skip(7);
  Part part;
  ASSERT_TRUE(parts.next(part));
  EXPECT_FALSE(part.outputs);
  EXPECT_TRUE(part.publishes);
  EXPECT_EQ(part.begin, 7);
  EXPECT_EQ(part.count, 43);
  ASSERT_TRUE(parts.next(part));
  EXPECT_TRUE(part.outputs);
  EXPECT_EQ(part.begin, 0);
  EXPECT_EQ(part.count, 50);
  EXPECT_FALSE(parts.next(part));
}

TEST(ChooseBlocks, FillsAGpuWhereCuttingPays) {
  using ssd_detail::choose_blocks;
  EXPECT_EQ(choose_blocks(8 * 64, 64, 8, 40, 132), 132);
  EXPECT_EQ(choose_blocks(16 * 32, 32, 16, 12, 132), 132);
  EXPECT_EQ(choose_blocks(1024, 1024, 1, 40, 132), 132);
  EXPECT_EQ(choose_blocks(32, 32, 1, 40, 132), 132);
  EXPECT_EQ(choose_blocks(2, 2, 1, 40, 132), 40);  // two chunks: each unit on its own
  EXPECT_EQ(choose_blocks(1024, 1024, 1, 1, 132), 32);
  EXPECT_EQ(choose_blocks(1, 1, 1, 1, 132), 1);
}

TEST(SuitsWarpgroups, PairsOfTilesOfAGroup) {
  Rng rng(2);
  const TokenRuns runs = cut_into_runs(2, 40, {}, {}, {}, false);
  const auto check = [&](std::int64_t heads, std::int64_t headdim, std::int64_t groups, bool suits,
                         std::int64_t pairs) {
    SCOPED_TRACE(concat("H ", heads, " P ", headdim, " G ", groups));
    const SsdArgs a = plain_case(
        rng, {.rows = 2, .length = 40, .heads = heads, .headdim = headdim, .groups = groups, .d_state = 64},
        DType::bf16);
    ssd_detail::Problem p{.x = a.x, .dt = a.dt, .A = a.A, .B = a.B, .C = a.C, .runs = &runs};
    EXPECT_EQ(ssd_detail::suits_warpgroups(p), suits);
    EXPECT_EQ(ssd_detail::pairs_of_tiles(p), pairs);
    p.z = a.x;
    EXPECT_FALSE(ssd_detail::suits_warpgroups(p));
  };
  check(2, 64, 1, true, 1);
  check(5, 64, 1, true, 3);
  check(2, 128, 2, true, 2);
  check(2, 64, 2, false, 2);
  check(6, 64, 2, true, 4);
}

// Long and short runs, cut among blocks in every way; on a GPU only they come to more than a moment.
TEST(SsdParts, CutRunsAgreeWithTheReference) {
  Rng rng(3);
  const auto check = [&](const SsdSizes& sizes, DType dtype, const std::vector<std::int64_t>& packed) {
    SsdArgs args = plain_case(rng, sizes, dtype);
    args.dt = random_tensor(rng, args.dt.shape(), dtype, 0.01, 0.1);
    args.D = random_tensor(rng, {sizes.heads});
    args.return_final_states = true;
    std::int64_t sequences = sizes.rows;
    if (!packed.empty()) {
      args.cu_seqlens = Tensor::from(packed);
      sequences = static_cast<std::int64_t>(packed.size()) - 1;
    }
    args.initial_states = random_tensor(rng, {sequences, sizes.heads, sizes.headdim, sizes.d_state});
    SCOPED_TRACE(concat("x ", args.x.shape(), " ", dtype, " N ", sizes.d_state, " sequences ", sequences));
    expect_fast(args, 2.0 * rounding_of(dtype));
    args.reverse = true;
    expect_fast(args, 2.0 * rounding_of(dtype));
    Context ctx;
    const SsdResult expected = run(ctx, ssd, args);
    args.final_states = args.initial_states.clone();
    args.initial_states = args.final_states;
    const SsdResult in_place = run(ctx, ssd, args);
    expect_same_bits(in_place.out, expected.out, "out of a second run");
    expect_same_bits(in_place.final_states, expected.final_states, "final_states in place");
  };
  const auto sizes = [](std::int64_t rows, std::int64_t length, std::int64_t heads, std::int64_t d_state) {
    return SsdSizes{
        .rows = rows, .length = length, .heads = heads, .headdim = 64, .groups = 1, .d_state = d_state};
  };
  check(sizes(1, 1500, 4, 128), DType::bf16, {});  // a unit in many blocks
  check(sizes(1, 2100, 3, 16), DType::f16, {});
  if (!on_gpu()) return;
  check(sizes(5, 130, 56, 16), DType::bf16, {});  // more units than blocks: some in two
  check(sizes(3, 200, 97, 64), DType::f16, {});
  check(sizes(1, 6000, 30, 16), DType::bf16, {});  // parts of more chunks than twice what is in flight
  check(sizes(1, 1700, 24, 32), DType::bf16, {0, 1, 70, 70, 1400, 1700});
}

}  // namespace
}  // namespace krait
