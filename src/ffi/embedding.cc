#include "krait/ops/embedding.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

void embedding(Given ids, Given weight, Given out) {
  Operands of("embedding");
  const EmbeddingArgs args{.ids = of("ids", ids), .weight = of("weight", weight), .out = of("out", out)};
  const Lease ctx(of.device());
  krait::embedding(*ctx, args);
}

void embedding_backward(Given ids, Given dout, Given dweight) {
  Operands of("embedding_backward");
  const EmbeddingBackwardArgs args{
      .ids = of("ids", ids), .dout = of("dout", dout), .dweight = of("dweight", dweight)};
  const Lease ctx(of.device());
  krait::embedding_backward(*ctx, args);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(embedding, krait::ffi::embedding)
KRAIT_FFI(embedding_backward, krait::ffi::embedding_backward)
