// The products of many rows where there is no cuBLASLt, in builds for HIP: all by the plain kernel, with the
// rounding that cuBLASLt's would have.
#include "ops/linear/kernels.h"

namespace krait::linear_detail {

bool gpu::cublaslt(Context& ctx, const Problem& p) {
  if (p.addend) ctx.copy(p.addend, p.out);
  plain(ctx, {.x = ctx.to(p.x, p.weight.dtype()),
              .weight = p.weight,
              .bias = p.bias,
              .out = p.out,
              .accumulate = p.accumulate || p.addend});
  return false;
}

}  // namespace krait::linear_detail
