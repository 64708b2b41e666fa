#include "krait/ops/decode_step.h"

#include "core/build.h"
#include "ops/decode_step/kernels.h"

namespace krait {

bool decode_step(Context& ctx, const DecodeStepArgs& args) {
  if constexpr (kWithCuda) {
    if (ctx.on_gpu() && decode_detail::run(ctx, args)) {
      ctx.set_backend("decode_step", "cuda");
      return true;
    }
  }
  return false;
}

}  // namespace krait
