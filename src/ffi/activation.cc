#include "krait/ops/activation.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"
#include "ffi/words.h"

namespace krait::ffi {
namespace {

void gated_silu(Given x, Given gate, Given out) {
  Operands of("gated_silu");
  const GatedSiluArgs args{.x = of("x", x), .gate = of("gate", gate), .out = of("out", out)};
  const Lease ctx(of.device());
  krait::gated_silu(*ctx, args);
}

void gated_silu_backward(Given x, Given gate, Given dout, Given dx, Given dgate) {
  Operands of("gated_silu_backward");
  const GatedSiluBackwardArgs args{.x = of("x", x),
                                   .gate = of("gate", gate),
                                   .dout = of("dout", dout),
                                   .dx = of("dx", dx),
                                   .dgate = of("dgate", dgate)};
  const Lease ctx(of.device());
  krait::gated_silu_backward(*ctx, args);
}

void gelu(Given x, Given out, const Word& kind) {
  Operands of("gelu");
  const GeluArgs args{.x = of("x", x), .out = of("out", out), .kind = gelu_kind_of("gelu", kind)};
  const Lease ctx(of.device());
  krait::gelu(*ctx, args);
}

void gelu_backward(Given x, Given dout, Given dx, const Word& kind) {
  Operands of("gelu_backward");
  const GeluBackwardArgs args{.x = of("x", x),
                              .dout = of("dout", dout),
                              .dx = of("dx", dx),
                              .kind = gelu_kind_of("gelu_backward", kind)};
  const Lease ctx(of.device());
  krait::gelu_backward(*ctx, args);
}

// out f32, of A_log's shape.
void negative_exp(Given A_log, Given out) {
  Operands of("negative_exp");
  const Tensor from = of("A_log", A_log);
  const Tensor to = of("out", out);
  require(from && to && to.shape() == from.shape(), "[negative_exp] out has shape ", to.shape(),
          ", expected ", from.shape());
  const Lease ctx(of.device());
  ctx->copy(krait::negative_exp(*ctx, from), to);
}

void negative_exp_backward(Given A, Given dA, Given dA_log) {
  Operands of("negative_exp_backward");
  const Tensor a = of("A", A);
  const Tensor da = of("dA", dA);
  const Tensor sum = of("dA_log", dA_log);
  const Lease ctx(of.device());
  krait::negative_exp_backward(*ctx, a, da, sum);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(gated_silu, krait::ffi::gated_silu)
KRAIT_FFI(gated_silu_backward, krait::ffi::gated_silu_backward)
KRAIT_FFI(gelu, krait::ffi::gelu)
KRAIT_FFI(gelu_backward, krait::ffi::gelu_backward)
KRAIT_FFI(negative_exp, krait::ffi::negative_exp)
KRAIT_FFI(negative_exp_backward, krait::ffi::negative_exp_backward)
