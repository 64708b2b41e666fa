#include "krait/ops/state_update.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

void state_update(Given state, Given x, Given dt, Given A, Given B, Given C, Given D, Given z, Given dt_bias,
                  Given state_batch_indices, bool dt_softplus, double dt_low, double dt_high, Given out) {
  Operands of("state_update");
  const StateUpdateArgs args{.state = of("state", state),
                             .x = of("x", x),
                             .dt = of("dt", dt),
                             .A = of("A", A),
                             .B = of("B", B),
                             .C = of("C", C),
                             .D = of("D", D),
                             .z = of("z", z),
                             .dt_bias = of("dt_bias", dt_bias),
                             .state_batch_indices = of("state_batch_indices", state_batch_indices),
                             .dt_softplus = dt_softplus,
                             .dt_limit = {static_cast<float>(dt_low), static_cast<float>(dt_high)},
                             .out = of("out", out)};
  const Lease ctx(of.device());
  krait::state_update(*ctx, args);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(state_update, krait::ffi::state_update)
