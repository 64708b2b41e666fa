// The forward on a GPU: the cut and the kernels that it takes.
#include <algorithm>

#include "ops/ssd/cuda/inputs.cuh"
#include "ops/ssd/kernels.h"

namespace krait::ssd_detail {

void run_cuda(Context& ctx, const Problem& p) {
  const Inputs in(p);
  std::int64_t longest = 0;
  for (const TokenRun& run : p.runs->runs) longest = std::max(longest, run.count);
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
