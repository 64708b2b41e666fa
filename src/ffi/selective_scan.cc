#include "krait/ops/selective_scan.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

constexpr const char* kOp = "selective_scan";

void selective_scan(Given u, Given delta, Given A, Given B, Given C, Given D, Given z, Given delta_bias,
                    Given initial_state, Given seq_idx, Given cu_seqlens, Given state_positions,
                    bool delta_softplus, bool reverse, Given out, Given last_state, Given states,
                    Given checkpoints) {
  Operands of(kOp);
  const SelectiveScanArgs args{.u = of("u", u),
                               .delta = of("delta", delta),
                               .A = of("A", A),
                               .B = of("B", B),
                               .C = of("C", C),
                               .D = of("D", D),
                               .z = of("z", z),
                               .delta_bias = of("delta_bias", delta_bias),
                               .initial_state = of("initial_state", initial_state),
                               .seq_idx = of("seq_idx", seq_idx),
                               .cu_seqlens = of("cu_seqlens", cu_seqlens),
                               .state_positions = of("state_positions", state_positions),
                               .delta_softplus = delta_softplus,
                               .reverse = reverse,
                               .out = of("out", out),
                               .last_state = of("last_state", last_state),
                               .states = of("states", states),
                               .checkpoints = of("checkpoints", checkpoints)};
  const Lease ctx(of.device());
  krait::selective_scan(*ctx, args);
}

void selective_scan_backward(Given u, Given delta, Given A, Given B, Given C, Given D, Given z,
                             Given delta_bias, Given initial_state, Given seq_idx, Given cu_seqlens,
                             bool delta_softplus, bool reverse, Given dout, Given dlast_state,
                             Given checkpoints, Given du, Given ddelta, Given dz, Given dinitial_state,
                             Given dB, Given dC, Given dA, Given dD, Given ddelta_bias) {
  Operands of(kOp);
  const SelectiveScanBackwardArgs args{.forward = {.u = of("u", u),
                                                   .delta = of("delta", delta),
                                                   .A = of("A", A),
                                                   .B = of("B", B),
                                                   .C = of("C", C),
                                                   .D = of("D", D),
                                                   .z = of("z", z),
                                                   .delta_bias = of("delta_bias", delta_bias),
                                                   .initial_state = of("initial_state", initial_state),
                                                   .seq_idx = of("seq_idx", seq_idx),
                                                   .cu_seqlens = of("cu_seqlens", cu_seqlens),
                                                   .delta_softplus = delta_softplus,
                                                   .reverse = reverse},
                                       .dout = of("dout", dout),
                                       .dlast_state = of("dlast_state", dlast_state),
                                       .checkpoints = of("checkpoints", checkpoints),
                                       .du = of("du", du),
                                       .ddelta = of("ddelta", ddelta),
                                       .dz = of("dz", dz),
                                       .dinitial_state = of("dinitial_state", dinitial_state),
                                       .dB = of("dB", dB),
                                       .dC = of("dC", dC),
                                       .dA = of("dA", dA),
                                       .dD = of("dD", dD),
                                       .ddelta_bias = of("ddelta_bias", ddelta_bias)};
  const Lease ctx(of.device());
  krait::selective_scan_backward(*ctx, args);
}

// (K, N, D) of the destination `checkpoints` for B rows of L tokens, D channels and N states, for the CPU
// (device_type 1, as DLPack counts) or a GPU.
tvm::ffi::Shape selective_scan_checkpoints_shape(std::int64_t batch, std::int64_t channels,
                                                 std::int64_t length, std::int64_t d_state, bool complex,
                                                 std::int64_t device_type) {
  const bool on_gpu = device_type != kDLCPU && device_type != kDLCUDAHost && device_type != kDLROCMHost;
  const Dims shape = krait::selective_scan_checkpoints_shape({batch, channels, length}, d_state, complex,
                                                             on_gpu ? Device::Kind::cuda : Device::Kind::cpu);
  return tvm::ffi::Shape(shape.begin(), shape.end());
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(selective_scan, krait::ffi::selective_scan)
KRAIT_FFI(selective_scan_backward, krait::ffi::selective_scan_backward)
KRAIT_FFI(selective_scan_checkpoints_shape, krait::ffi::selective_scan_checkpoints_shape)
