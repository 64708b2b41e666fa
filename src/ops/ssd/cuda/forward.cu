// The forward on a GPU: the cut and the kernels that it takes.
#include <algorithm>
#include <cstdint>

#include "core/cuda/backend.h"
#include "ops/ssd/cuda/inputs.cuh"
#include "ops/ssd/kernels.h"

namespace krait::ssd_detail {

namespace {

// Whether two columns of f32 states, absent or in rows, may be read and written at once.
bool in_pairs(const Tensor& states) {
  if (!states) return true;
  const auto even = [&](int dim) { return states.size(dim) == 1 || states.stride(dim) % 2 == 0; };
  return states.dtype() == DType::f32 && states.stride(3) == 1 && even(0) && even(1) && even(2) &&
         reinterpret_cast<std::uintptr_t>(states.raw()) % 8 == 0;
}

// On products of warpgroups. `longest`: chunks of a run.
void run_persistent(Context& ctx, const Problem& p, const Segments& chunks, std::int64_t longest) {
  const std::int64_t pairs = pairs_of_tiles(p);
  const std::int64_t blocks =
      choose_blocks(chunks.count, longest, chunks.runs, pairs, cuda::limits_of(ctx).multiprocessors);
  Problem own = p;
  if (!in_pairs(p.initial_states)) {
    own.initial_states = ctx.empty(p.initial_states.shape());
    ctx.copy(p.initial_states, own.initial_states);
  }
  if (!in_pairs(p.final_states)) own.final_states = ctx.empty(p.final_states.shape());
  persistent_outputs(ctx, Inputs(own), chunks, blocks, own);
  if (!in_pairs(p.final_states)) ctx.copy(own.final_states, p.final_states);
  clear_padding(ctx, chunks, p.out);
}

}  // namespace

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
