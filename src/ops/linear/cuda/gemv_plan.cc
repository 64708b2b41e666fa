// How gemv on a GPU divides a weight among blocks and warps.
#include <algorithm>
#include <cstdint>

#include "ops/linear/kernels.h"

namespace krait::linear_detail {

gpu::GemvPlan gpu::choose_gemv_plan(std::int64_t rows, std::int64_t in, std::int64_t out, DType weight,
                                    int multiprocessors) {
  GemvPlan plan;
  const std::int64_t piece = weight == DType::f32 ? 4 : 8;  // elements in 16 bytes
  const std::int64_t pieces = std::max<std::int64_t>(1, (in + piece - 1) / piece);
  // Short rows lie side by side in a warp.
  while (plan.lanes > 4 && plan.lanes / 2 >= pieces) plan.lanes /= 2;
  plan.steps = (pieces + plan.lanes - 1) / plan.lanes;

  // x of a tile in shared memory, so that 3 blocks (2 for many rows) fit a multiprocessor.
  const std::int64_t budget = (rows <= 4 ? 64 : 96) * 1024;
  const std::int64_t step_bytes = rows * plan.lanes * piece * 4;
  plan.tile = std::min(plan.steps, std::max<std::int64_t>(1, budget / step_bytes));

  // The multiprocessor with the most rows sets the time. More splits divide rows more evenly, while warps
  // that have a step less than others wait for them.
  const auto groups = [&] { return (out + plan.rows_of_block() - 1) / plan.rows_of_block(); };
  double best = 0.0;
  int chosen = 1;
  for (const int splits : {1, 2, 4, 8}) {
    if (splits > 1 && (plan.lanes < 32 || splits > plan.tile)) break;
    plan.splits = splits;
    const std::int64_t rounds = (groups() + multiprocessors - 1) / multiprocessors;
    const auto steps_of_warp = static_cast<double>((plan.steps + splits - 1) / splits);
    const double unevenness = steps_of_warp * splits / static_cast<double>(plan.steps);
    const double time = static_cast<double>(rounds * plan.rows_of_block()) * (0.75 + 0.25 * unevenness);
    if (splits > 1 && time >= best) continue;
    best = time;
    chosen = splits;
  }
  plan.splits = chosen;
  // Every warp takes its steps of every tile at the same places.
  if (plan.tile < plan.steps) plan.tile -= plan.tile % plan.splits;
  plan.groups = groups();
  return plan;
}

}  // namespace krait::linear_detail
