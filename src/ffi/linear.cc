#include "krait/ops/linear.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

void linear(Given x, Given weight, Given bias, Given out, bool accumulate) {
  Operands of("linear");
  const LinearArgs args{.x = of("x", x),
                        .weight = of("weight", weight),
                        .bias = of("bias", bias),
                        .out = of("out", out),
                        .accumulate = accumulate};
  const Lease ctx(of.device());
  krait::linear(*ctx, args);
}

void linear_backward(Given x, Given weight, Given dout, Given dx, bool accumulate_dx, Given dweight,
                     Given dbias) {
  Operands of("linear_backward");
  const LinearBackwardArgs args{.x = of("x", x),
                                .weight = of("weight", weight),
                                .dout = of("dout", dout),
                                .dx = of("dx", dx),
                                .accumulate_dx = accumulate_dx,
                                .dweight = of("dweight", dweight),
                                .dbias = of("dbias", dbias)};
  const Lease ctx(of.device());
  krait::linear_backward(*ctx, args);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(linear, krait::ffi::linear)
KRAIT_FFI(linear_backward, krait::ffi::linear_backward)
