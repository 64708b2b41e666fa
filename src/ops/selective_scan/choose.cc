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

}  // namespace krait::scan
