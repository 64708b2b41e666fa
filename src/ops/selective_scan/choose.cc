// The choices of path and sizes, apart from what they are for.
#include <algorithm>

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

bool fits_tiles(const Problem& p) {
  return !p.complex && p.B.ndim() == 4 && p.C.ndim() == 4 && p.d_state >= 1 && p.d_state <= 256;
}

LanePlan choose_lanes(std::int64_t runs, std::int64_t groups, std::int64_t channels_per_group,
                      std::int64_t length, std::int64_t d_state, int multiprocessors) {
  constexpr std::int64_t kThreads = 128;   // of a block
  constexpr std::int64_t kShortest = 256;  // tokens of a piece: a shorter one costs more than it gives
  const auto blocks = [&](std::int64_t lanes) {
    const std::int64_t channels = kThreads / lanes;
    return runs * groups * ((channels_per_group + channels - 1) / channels);
  };
  LanePlan plan = {.lanes = 4, .states = 4};
  if (d_state > 64)
    plan = {.lanes = 32, .states = 8};
  else if (d_state > 32)
    plan = {.lanes = 16, .states = 4};
  else if (d_state > 16)
    plan = {.lanes = 8, .states = 4};
  else
    // More lanes a channel are work that hides the latency of other work; what all lanes of a channel do
    // alike makes them dearer.
    for (; plan.lanes < 16 && blocks(plan.lanes) < 3 * std::int64_t{multiprocessors}; plan.lanes *= 2)
      plan.states /= 2;

  // Pieces walk the tokens twice: only where most of the device would have nothing to do.
  const std::int64_t steps = (length + kCheckpointSteps - 1) / kCheckpointSteps;
  std::int64_t parts = 1;
  while (blocks(plan.lanes) * parts * 2 <= multiprocessors * 2 && length / (parts * 2) >= kShortest)
    parts *= 2;
  plan.piece = std::max<std::int64_t>((steps + parts - 1) / parts, 1) * kCheckpointSteps;
  return plan;
}

}  // namespace krait::scan
