// The forward on a GPU: the cut and the kernels that it takes.
#include <algorithm>

#include "core/cuda/backend.h"
#include "ops/ssd/cuda/inputs.cuh"
#include "ops/ssd/kernels.h"

namespace krait::ssd_detail {
namespace {

// On products of warpgroups. `longest`: chunks of a run.
void run_persistent(Context& ctx, const Problem& p, const Segments& chunks, std::int64_t longest) {
  const std::int64_t pairs = pairs_of_tiles(p);
  const std::int64_t blocks =
      choose_blocks(chunks.count, longest, chunks.runs, pairs, cuda::limits_of(ctx).multiprocessors);
  Problem own = p;
  own.initial_states = as_pairs(ctx, p.initial_states);
  const bool copied = !in_pairs(p.final_states, DType::f32);
  if (copied) own.final_states = ctx.empty(p.final_states.shape());
  persistent_outputs(ctx, Inputs(own), chunks, blocks, own);
  if (copied) ctx.copy(own.final_states, p.final_states);
  clear_padding(ctx, chunks, p.out);
}

}  // namespace

Tensor as_pairs(Context& ctx, const Tensor& states) {
  if (in_pairs(states, DType::f32)) return states;
  const Tensor copy = ctx.empty(states.shape());
  ctx.copy(states, copy);
  return copy;
}

void run_cuda(Context& ctx, const Problem& p) {
  std::int64_t longest = 0;
  for (const TokenRun& run : p.runs->runs) longest = std::max(longest, run.count);
  if (cuda::has_warpgroup_products(ctx) && suits_warpgroups(p)) {
    Tensor lists;
    const Segments chunks = cut_into_segments(ctx, *p.runs, p.x.size(1), kChunk, lists);
    run_persistent(ctx, p, chunks, (longest + kChunk - 1) / kChunk);
    return;
  }
  const Inputs in(p);
  const auto run_count = static_cast<std::int64_t>(p.runs->runs.size());
  const bool chunked = cuda::limits_of(ctx).compute_capability >= 80 && suits_tensor_cores(p);
  Tensor memory;
  const Segments segments = cut_into_segments(
      ctx, *p.runs, p.x.size(1),
      (chunked ? choose_chunked : choose_walk)(run_count, longest, in.heads, in.headdim), memory);
  Tensor starts;
  if (segments.per_run > 1) {
    starts = ctx.empty({segments.count, in.heads, in.headdim, in.d_state});
    const Tensor decays = ctx.empty({segments.count, in.heads});
    segment_decays(ctx, in, segments, decays);
    (chunked ? chunked_ends : walk_ends)(ctx, in, segments, starts);
    pass_states(ctx, in, segments, decays, starts);
  }
  (chunked ? chunked_outputs : walk_outputs)(ctx, in, segments, starts, p);
  clear_padding(ctx, segments, p.out);
}

}  // namespace krait::ssd_detail
