#include "krait/ops/norm.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"
#include "ffi/words.h"

namespace krait::ffi {
namespace {

void norm(const Word& kind, Given x, Given weight, Given bias, Given residual, Given z, double eps,
          std::int64_t group_size, bool norm_before_gate, bool residual_in_fp32, Given out,
          Given residual_out) {
  Operands of("norm");
  const NormArgs args{.x = of("x", x),
                      .weight = of("weight", weight),
                      .bias = of("bias", bias),
                      .residual = of("residual", residual),
                      .z = of("z", z),
                      .eps = eps,
                      .group_size = group_size,
                      .norm_before_gate = norm_before_gate,
                      .prenorm = static_cast<bool>(residual_out),
                      .residual_in_fp32 = residual_in_fp32,
                      .out = of("out", out),
                      .residual_out = of("residual_out", residual_out)};
  const NormKind which = norm_kind_of("norm", kind);
  const Lease ctx(of.device());
  krait::norm(*ctx, which, args);
}

void norm_backward(const Word& kind, Given x, Given weight, Given bias, Given z, double eps,
                   std::int64_t group_size, bool norm_before_gate, Given dout, Given dresidual, Given dx,
                   Given dx_rounded, Given dz, Given dweight, Given dbias) {
  Operands of("norm_backward");
  const NormBackwardArgs args{.x = of("x", x),
                              .weight = of("weight", weight),
                              .bias = of("bias", bias),
                              .z = of("z", z),
                              .eps = eps,
                              .group_size = group_size,
                              .norm_before_gate = norm_before_gate,
                              .dout = of("dout", dout),
                              .dresidual = of("dresidual", dresidual),
                              .dx = of("dx", dx),
                              .dx_rounded = of("dx_rounded", dx_rounded),
                              .dz = of("dz", dz),
                              .dweight = of("dweight", dweight),
                              .dbias = of("dbias", dbias)};
  const NormKind which = norm_kind_of("norm_backward", kind);
  const Lease ctx(of.device());
  krait::norm_backward(*ctx, which, args);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(norm, krait::ffi::norm)
KRAIT_FFI(norm_backward, krait::ffi::norm_backward)
