#include "krait/ops/rotary.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

void rotary_embedding(Given x, Given positions, std::int64_t dim, double base, bool interleaved,
                      bool inverse) {
  Operands of("rotary_embedding");
  const RotaryArgs args{.x = of("x", x),
                        .positions = of("positions", positions),
                        .dim = dim,
                        .base = base,
                        .interleaved = interleaved,
                        .inverse = inverse};
  const Lease ctx(of.device());
  krait::rotary_embedding(*ctx, args);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(rotary_embedding, krait::ffi::rotary_embedding)
