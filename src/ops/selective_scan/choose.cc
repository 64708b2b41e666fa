// The choices of path and sizes, apart from what they are for.
#include <algorithm>
#include <span>

#include "ops/selective_scan/scan.h"

namespace krait::scan {

ScanPath choose_path(ScanPath requested, bool double_precision, bool prefer_reference) {
  if (requested != ScanPath::automatic) return requested;
  return double_precision || prefer_reference ? ScanPath::reference : ScanPath::simd;
}

constexpr std::int64_t kNarrowestBlock = 8;

std::int64_t choose_channel_block(std::int64_t rows, std::int64_t groups, std::int64_t channels_per_group,
                                  int threads) {
  std::int64_t block = kWidestBlock;
  const auto items = [&] { return rows * groups * ((channels_per_group + block - 1) / block); };
  while (block > kNarrowestBlock && items() < 2 * std::int64_t{threads}) block /= 2;
  return block;
}

std::int64_t choose_steps(std::int64_t d_state, bool complex) {
  constexpr std::int64_t kFloats = 7 * 1024;  // 28 KiB
  const std::int64_t each = 3 * kWidestBlock + (complex ? 4 : 2) * d_state;
  return std::clamp<std::int64_t>(kFloats / each / 8 * 8, 8, 64);
}

Division divide_backward(std::int64_t rows, std::int64_t groups, std::int64_t channels_per_group) {
  constexpr std::int64_t kItems = 32;  // enough for many threads; more cost memory for partial sums
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  Division division;
  division.block = choose_channel_block(rows, groups, channels_per_group, kItems / 4);
  division.blocks = std::max<std::int64_t>(ceil_div(channels_per_group, division.block), 1);
  division.parts = std::clamp<std::int64_t>(ceil_div(kItems, groups * division.blocks), 1,
                                            std::max<std::int64_t>(rows, 1));
  const std::int64_t wanted =
      std::clamp<std::int64_t>(ceil_div(kItems, division.parts * groups), 1, division.blocks);
  division.deep = ceil_div(division.blocks, wanted);
  division.segments = ceil_div(division.blocks, division.deep);
  return division;
}

std::int64_t choose_backward_steps(std::int64_t d_state, bool complex) {
  // With 32 steps the record of four states and a strip of one vector of channels fit into 32 KiB together
  // (with vectors of eight). Many states take shorter tiles, for B and C to stay in the second-level cache.
  constexpr std::int64_t kFloats = 16 * 1024;
  const std::int64_t each = std::max<std::int64_t>((complex ? 4 : 2) * d_state, 1);
  return std::clamp<std::int64_t>(kFloats / each / 8 * 8, 8, 32);
}

std::int64_t count_checkpoints(std::int64_t run_length) {
  return run_length == 0 ? 0 : (run_length - 1) / kCheckpointSteps;
}

std::int64_t count_checkpoints(const TokenRuns& runs) {
  std::int64_t count = 0;
  for (const TokenRun& run : runs.runs) count += count_checkpoints(run.count);
  return count;
}

std::int64_t count_most_checkpoints(std::int64_t rows, std::int64_t length, std::int64_t steps) {
  // Cutting a row in two takes as many steps of each part as the row had, or fewer.
  return length == 0 ? 0 : rows * ((length - 1) / steps);
}

bool fits_tiles(const Problem& p) {
  return !p.complex && p.B.ndim() == 4 && p.C.ndim() == 4 && p.d_state >= 1 && p.d_state <= 256;
}

namespace {

std::int64_t count_blocks(const LanePlan& plan, std::int64_t runs, std::int64_t groups,
                          std::int64_t channels_per_group) {
  constexpr std::int64_t kThreads = 128;  // of a block
  const std::int64_t channels = kThreads / plan.lanes * plan.per_team;
  return runs * groups * ((channels_per_group + channels - 1) / channels);
}

// Of more than 16 states, of which a channel's lanes leave no choice.
LanePlan plan_of_many_states(std::int64_t d_state) {
  if (d_state > 64) return {.lanes = 32, .states = 8};
  if (d_state > 32) return {.lanes = 16, .states = 4};
  return {.lanes = 8, .states = 4};
}

}  // namespace

LanePlan choose_forward(std::int64_t runs, std::int64_t groups, std::int64_t channels_per_group,
                        std::int64_t length, std::int64_t d_state, bool channel_last, int multiprocessors) {
  constexpr std::int64_t kShortest = 256;  // tokens of a piece: a shorter one costs more than it gives
  // What a token of a block costs, in clocks of a multiprocessor: `work` where others are there to fill the
  // gaps, `alone` where none is.
  struct Candidate {
    LanePlan plan;
    std::int64_t work;
    std::int64_t alone;
  };
  // Measured on an H200.
  constexpr Candidate kAnyLayout[] = {{{.lanes = 4, .states = 4, .per_team = 4, .resident = 2}, 245, 350},
                                      {{.lanes = 4, .states = 4, .per_team = 1, .resident = 2}, 80, 118},
                                      {{.lanes = 4, .states = 4, .per_team = 1, .resident = 4}, 79, 170}};
  constexpr Candidate kChannelLast[] = {{{.lanes = 4, .states = 4, .per_team = 4, .resident = 2}, 208, 244},
                                        {{.lanes = 4, .states = 4, .per_team = 2, .resident = 2}, 114, 153},
                                        {{.lanes = 4, .states = 4, .per_team = 1, .resident = 2}, 60, 76},
                                        {{.lanes = 8, .states = 2, .per_team = 1, .resident = 2}, 39, 50}};
  const auto blocks = [&](const LanePlan& plan) {
    return count_blocks(plan, runs, groups, channels_per_group);
  };
  LanePlan plan;
  if (d_state > 16) {
    plan = plan_of_many_states(d_state);
  } else {
    // Blocks take equally long, and so come in waves.
    const auto cost_of = [&](const Candidate& c) {
      const auto cost_on = [&](std::int64_t resident) { return std::max(resident * c.work, c.alone); };
      const std::int64_t at_once = std::int64_t{c.plan.resident} * multiprocessors;
      const std::int64_t rest = blocks(c.plan) % at_once;
      return blocks(c.plan) / at_once * cost_on(c.plan.resident) +
             (rest == 0 ? 0 : cost_on((rest + multiprocessors - 1) / multiprocessors));
    };
    std::int64_t least = 0;
    using Candidates = std::span<const Candidate>;
    for (const Candidate& c : channel_last ? Candidates(kChannelLast) : Candidates(kAnyLayout)) {
      const std::int64_t cost = cost_of(c);
      if (plan.lanes == 0 || cost < least) {
        plan = c.plan;
        least = cost;
      }
    }
  }

  // Pieces walk the tokens twice: only where most of the device would have nothing to do.
  const std::int64_t steps = (length + kCheckpointSteps - 1) / kCheckpointSteps;
  std::int64_t parts = 1;
  while (blocks(plan) * parts <= multiprocessors && length / (parts * 2) >= kShortest) parts *= 2;
  if (parts < 4) parts = 1;
  plan.piece = std::max<std::int64_t>((steps + parts - 1) / parts, 1) * kCheckpointSteps;
  return plan;
}

LanePlan choose_backward(std::int64_t runs, std::int64_t groups, std::int64_t channels_per_group,
                         std::int64_t length, bool whole_rows, std::int64_t d_state, int multiprocessors) {
  constexpr std::int64_t kResident = 2;    // blocks that a multiprocessor has room for
  constexpr std::int64_t kShortest = 256;  // tokens of a piece: a shorter one costs more than it gives
  const auto blocks = [&](const LanePlan& plan) {
    return count_blocks(plan, runs, groups, channels_per_group);
  };
  if (d_state > 16) return plan_of_many_states(d_state);
  // The fewer threads share a channel, the less there is to sum. Where these would not fill the device, rows
  // are cut into pieces, which a pass over gradients of the state alone makes independent.
  const LanePlan few = {.lanes = 4, .states = 4, .per_team = 2};
  if (2 * blocks(few) >= 3 * std::int64_t{multiprocessors}) {
    // Blocks take equally long, and so come in waves. Where the last one would leave much of the device idle,
    // rows are cut into pieces that are walked in turn: more waves of shorter blocks.
    LanePlan plan = few;
    const std::int64_t at_once = kResident * multiprocessors;
    const std::int64_t steps = (length + kCheckpointSteps - 1) / kCheckpointSteps;
    std::int64_t least = 0;
    for (std::int64_t parts = 1; parts <= 8; parts *= 2) {
      if (parts > 1 && (!whole_rows || blocks(few) <= at_once || length / parts < kShortest / 2)) break;
      const std::int64_t of_part = std::max<std::int64_t>((steps + parts - 1) / parts, 1);
      const std::int64_t pieces = blocks(few) * ((steps + of_part - 1) / of_part);
      // What begins and ends a piece takes as long as a tile.
      const std::int64_t cost = (pieces + at_once - 1) / at_once * (of_part + 1);
      if (parts == 1 || cost < least) {
        least = cost;
        plan.piece = parts == 1 ? 0 : of_part * kCheckpointSteps;
        plan.in_turn = parts > 1;
      }
    }
    return plan;
  }
  if (whole_rows && blocks(few) > 0) {
    std::int64_t parts = 1;
    while (length % (2 * parts * kCheckpointSteps) == 0 && length / (2 * parts) >= kShortest &&
           2 * parts * blocks(few) <= kResident * multiprocessors)
      parts *= 2;
    if (parts >= 2 && 4 * parts * blocks(few) >= 3 * std::int64_t{multiprocessors}) {
      LanePlan plan = few;
      plan.piece = length / parts;
      return plan;
    }
  }
  constexpr LanePlan kMore[] = {{.lanes = 4, .states = 4, .per_team = 1},
                                {.lanes = 8, .states = 2, .per_team = 1},
                                {.lanes = 16, .states = 1, .per_team = 1}};
  for (const LanePlan& candidate : kMore)
    if (2 * blocks(candidate) >= 3 * std::int64_t{multiprocessors}) return candidate;
  return kMore[2];
}

bool suits_roles(const LanePlan& plan, std::int64_t channels_per_group) {
  if (plan.lanes != 4 || plan.per_team != 2) return false;
  // Blocks of 128 channels instead of 64 take a tenth less time for each, but more of the last one's may be
  // missing.
  const std::int64_t halves = (channels_per_group + 63) / 64;
  return 9 * (halves + halves % 2) <= 10 * halves;
}

}  // namespace krait::scan
