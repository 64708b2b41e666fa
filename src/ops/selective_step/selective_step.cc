#include "krait/ops/selective_step.h"

#include "core/build.h"
#include "krait/core/error.h"
#include "krait/ops/linear.h"
#include "krait/ops/state_update.h"
#include "ops/selective_step/kernels.h"

namespace krait {

Tensor selective_step(Context& ctx, const SelectiveStepArgs& args) {
  require(args.x && args.x.ndim() == 2, "[selective_step] x has shape ", args.x ? args.x.shape() : Dims{},
          ", expected (B, D)");
  require(args.low_dt && args.low_dt.ndim() == 2 && args.low_dt.size(0) == args.x.size(0),
          "[selective_step] low_dt has shape ", args.low_dt ? args.low_dt.shape() : Dims{}, ", expected (",
          args.x.size(0), ", rank)");
  require(args.dt_weight && args.dt_weight.shape() == Dims{args.x.size(1), args.low_dt.size(1)},
          "[selective_step] dt_weight has shape ", args.dt_weight ? args.dt_weight.shape() : Dims{},
          ", expected ", Dims{args.x.size(1), args.low_dt.size(1)});
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      const Tensor out = args.out ? args.out : ctx.empty(args.x.shape(), args.x.dtype());
      if (selective_step_detail::fused(ctx, args, out)) {
        ctx.set_backend("selective_step", "cuda");
        return out;
      }
    }
  }
  const Tensor dt = linear(ctx, {.x = args.low_dt, .weight = args.dt_weight});
  const Tensor out = state_update(ctx, {.state = args.state,
                                        .x = args.x,
                                        .dt = dt,
                                        .A = args.A,
                                        .B = args.B,
                                        .C = args.C,
                                        .D = args.D,
                                        .z = args.z,
                                        .dt_bias = args.dt_bias,
                                        .state_batch_indices = args.state_batch_indices,
                                        .dt_softplus = true,
                                        .out = args.out});
  ctx.set_backend("selective_step", "linear, state_update");
  return out;
}

}  // namespace krait
