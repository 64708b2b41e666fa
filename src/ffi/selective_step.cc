#include "krait/ops/selective_step.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

void selective_step(Given state, Given x, Given low_dt, Given dt_weight, Given dt_bias, Given A, Given B,
                    Given C, Given D, Given z, Given state_batch_indices, Given out) {
  Operands of("selective_step");
  const SelectiveStepArgs args{.state = of("state", state),
                               .x = of("x", x),
                               .low_dt = of("low_dt", low_dt),
                               .dt_weight = of("dt_weight", dt_weight),
                               .dt_bias = of("dt_bias", dt_bias),
                               .A = of("A", A),
                               .B = of("B", B),
                               .C = of("C", C),
                               .D = of("D", D),
                               .z = of("z", z),
                               .state_batch_indices = of("state_batch_indices", state_batch_indices),
                               .out = of("out", out)};
  const Lease ctx(of.device());
  krait::selective_step(*ctx, args);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(selective_step, krait::ffi::selective_step)
