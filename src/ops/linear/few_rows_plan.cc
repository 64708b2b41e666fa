#include <algorithm>

#include "ops/linear/few_rows.h"

namespace krait::linear_detail {

FewRowsPlan choose_few_rows_plan(std::int64_t rows, std::int64_t in, std::int64_t out, int multiprocessors,
                                 std::int64_t shared_memory) {
  FewRowsPlan plan;
  constexpr std::int64_t kMostSize = std::int64_t{1} << 30;  // counted in 32 bits
  if (rows < 1 || rows > kFewRowsMost || in < 1 || in % 8 != 0 || in > kMostSize || out < 1 ||
      out > kMostSize)
    return plan;
  plan.blocks = static_cast<int>(std::min<std::int64_t>(multiprocessors, out));
  const std::int64_t rows_of_block = (out + plan.blocks - 1) / plan.blocks;
  const bool wide = rows > 8;
  plan.tiles = rows_of_block <= 8 ? 1 : rows_of_block <= 16 || wide ? 2 : 4;
  const std::int64_t along = kFewRowsWarps * kFewRowsStep;
  plan.steps = static_cast<int>((in + along - 1) / along);
  // Two neighbouring rows of x lie in different banks.
  plan.x_stride = static_cast<int>(plan.padded_in()) + 32;
  plan.slots = wide ? 8 : 16;
  const std::int64_t x_bytes = rows * plan.x_stride * 2;
  const std::int64_t sums = std::int64_t{2} * kFewRowsWarps * rows * plan.tiles * 8 * 4;
  plan.shared = std::int64_t{plan.slots} * kFewRowsThreads * 16 + x_bytes + sums;
  if (plan.shared + 1024 > shared_memory) plan.tiles = 0;
  return plan;
}

}  // namespace krait::linear_detail
