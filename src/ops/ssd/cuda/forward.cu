// The forward on a GPU: the cut and the kernels that it takes.
#include <algorithm>

#include "core/cuda/backend.h"
#include "ops/ssd/cuda/inputs.cuh"
#include "ops/ssd/kernels.h"

namespace krait::ssd_detail {

void run_cuda(Context& ctx, const Problem& p) {
  std::int64_t longest = 0;
  for (const TokenRun& run : p.runs->runs) longest = std::max(longest, run.count);
  if (cuda::has_warpgroup_products(ctx) && suits_warpgroups(p)) {
    Tensor lists;
    const Segments chunks = cut_into_segments(ctx, *p.runs, p.x.size(1), kChunk, lists);
    longest = (longest + kChunk - 1) / kChunk;
    const std::int64_t pairs = pairs_of_tiles(p);
    const std::int64_t blocks =
        choose_blocks(chunks.count, longest, chunks.runs, pairs, cuda::limits_of(ctx).multiprocessors);
    Problem whole = p;
    // Runs that are walked twice read their initial states twice, the second time perhaps when others have
    // written final states.
    if (p.initial_states && p.final_states && p.initial_states.raw() == p.final_states.raw() &&
        longest * blocks > chunks.count * pairs) {
      whole.initial_states = ctx.empty(p.initial_states.shape(), p.initial_states.dtype());
      ctx.copy(p.initial_states, whole.initial_states);
    }
    persistent_outputs(ctx, Inputs(whole), chunks, blocks, whole);
    clear_padding(ctx, chunks, p.out);
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
