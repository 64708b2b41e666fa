#include "krait/ops/dropout.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

// Seeds, streams and offsets are the 64 bits of their two's complement.
void dropout(Given x, double probability, std::int64_t seed, std::int64_t stream, std::int64_t offset,
             Given out) {
  Operands of("dropout");
  const DropoutArgs args{.x = of("x", x),
                         .probability = probability,
                         .seed = static_cast<std::uint64_t>(seed),
                         .stream = static_cast<std::uint64_t>(stream),
                         .offset = static_cast<std::uint64_t>(offset),
                         .out = of("out", out)};
  const Lease ctx(of.device());
  krait::dropout(*ctx, args);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(dropout, krait::ffi::dropout)
