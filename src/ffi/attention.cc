#include "krait/ops/attention.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

void attention(Given q, Given k, Given v, bool causal, double scale, Given out, Given logsumexp) {
  Operands of("attention");
  const AttentionArgs args{.q = of("q", q),
                           .k = of("k", k),
                           .v = of("v", v),
                           .causal = causal,
                           .scale = scale,
                           .out = of("out", out),
                           .logsumexp = of("logsumexp", logsumexp)};
  const Lease ctx(of.device());
  krait::attention(*ctx, args);
}

void attention_backward(Given q, Given k, Given v, bool causal, double scale, Given out, Given logsumexp,
                        Given dout, Given dq, Given dk, Given dv) {
  Operands of("attention_backward");
  const AttentionBackwardArgs args{.q = of("q", q),
                                   .k = of("k", k),
                                   .v = of("v", v),
                                   .causal = causal,
                                   .scale = scale,
                                   .out = of("out", out),
                                   .logsumexp = of("logsumexp", logsumexp),
                                   .dout = of("dout", dout),
                                   .dq = of("dq", dq),
                                   .dk = of("dk", dk),
                                   .dv = of("dv", dv)};
  const Lease ctx(of.device());
  krait::attention_backward(*ctx, args);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(attention, krait::ffi::attention)
KRAIT_FFI(attention_backward, krait::ffi::attention_backward)
