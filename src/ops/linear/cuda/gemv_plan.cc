// How gemv on a GPU divides a weight among blocks and warps.
#include <algorithm>
#include <cstdint>

#include "ops/linear/kernels.h"

namespace krait::linear_detail {

gpu::GemvPlan gpu::choose_gemv_plan(std::int64_t rows, std::int64_t in, std::int64_t out, DType weight,
                                    int multiprocessors, std::int64_t shared_memory) {
  GemvPlan plan;
  const std::int64_t piece = weight == DType::f32 ? 4 : 8;  // elements in 16 bytes
  const std::int64_t pieces = std::max<std::int64_t>(1, (in + piece - 1) / piece);
  // Short rows lie side by side in a warp.
  while (plan.lanes > 4 && plan.lanes / 2 >= pieces) plan.lanes /= 2;
  plan.steps = (pieces + plan.lanes - 1) / plan.lanes;

  // x of a tile in shared memory.
  const std::int64_t budget =
      std::min<std::int64_t>(192 * 1024 / gemv_blocks(rows), shared_memory - gemv_exchange_bytes(rows));
  const std::int64_t step_bytes = rows * plan.lanes * piece * 4;
  plan.tile = std::min(plan.steps, std::max<std::int64_t>(1, budget / step_bytes));

  // Where there are fewer units than warps at work, warps share them, so that enough bytes are on their way.
  plan.units = (out + plan.rows_of_unit() - 1) / plan.rows_of_unit();
  const std::int64_t warps = std::int64_t{multiprocessors} * gemv_blocks(rows) * kGemvWarps;
  while (plan.lanes == 32 && plan.splits < kGemvWarps && 2 * plan.splits <= plan.tile &&
         4 * plan.units * plan.splits < 3 * warps)
    plan.splits *= 2;
  // Every warp takes its steps of every tile at the same places.
  if (plan.tile < plan.steps) plan.tile -= plan.tile % plan.splits;
  return plan;
}

}  // namespace krait::linear_detail
