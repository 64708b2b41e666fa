#include "krait/ops/ssd.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

constexpr const char* kOp = "ssd";

void ssd(Given x, Given dt, Given A, Given B, Given C, Given D, Given z, Given dt_bias, Given initial_states,
         Given seq_idx, Given cu_seqlens, Given state_positions, bool dt_softplus, double dt_low,
         double dt_high, bool reverse, std::int64_t chunk_size, Given out, Given final_states, Given states) {
  Operands of(kOp);
  const SsdArgs args{.x = of("x", x),
                     .dt = of("dt", dt),
                     .A = of("A", A),
                     .B = of("B", B),
                     .C = of("C", C),
                     .D = of("D", D),
                     .z = of("z", z),
                     .dt_bias = of("dt_bias", dt_bias),
                     .initial_states = of("initial_states", initial_states),
                     .seq_idx = of("seq_idx", seq_idx),
                     .cu_seqlens = of("cu_seqlens", cu_seqlens),
                     .state_positions = of("state_positions", state_positions),
                     .dt_softplus = dt_softplus,
                     .dt_limit = {static_cast<float>(dt_low), static_cast<float>(dt_high)},
                     .reverse = reverse,
                     .chunk_size = chunk_size,
                     .out = of("out", out),
                     .final_states = of("final_states", final_states),
                     .states = of("states", states)};
  const Lease ctx(of.device());
  krait::ssd(*ctx, args);
}

void ssd_backward(Given x, Given dt, Given A, Given B, Given C, Given D, Given z, Given dt_bias,
                  Given initial_states, Given seq_idx, Given cu_seqlens, bool dt_softplus, double dt_low,
                  double dt_high, bool reverse, std::int64_t chunk_size, Given dout, Given dfinal_states,
                  Given dx, Given ddt, Given dB, Given dC, Given dz, Given dinitial_states, Given dA,
                  Given dD, Given ddt_bias) {
  Operands of("ssd_backward");
  const SsdBackwardArgs args{
      .forward = {.x = of("x", x),
                  .dt = of("dt", dt),
                  .A = of("A", A),
                  .B = of("B", B),
                  .C = of("C", C),
                  .D = of("D", D),
                  .z = of("z", z),
                  .dt_bias = of("dt_bias", dt_bias),
                  .initial_states = of("initial_states", initial_states),
                  .seq_idx = of("seq_idx", seq_idx),
                  .cu_seqlens = of("cu_seqlens", cu_seqlens),
                  .dt_softplus = dt_softplus,
                  .dt_limit = {static_cast<float>(dt_low), static_cast<float>(dt_high)},
                  .reverse = reverse,
                  .chunk_size = chunk_size},
      .dout = of("dout", dout),
      .dfinal_states = of("dfinal_states", dfinal_states),
      .dx = of("dx", dx),
      .ddt = of("ddt", ddt),
      .dB = of("dB", dB),
      .dC = of("dC", dC),
      .dz = of("dz", dz),
      .dinitial_states = of("dinitial_states", dinitial_states),
      .dA = of("dA", dA),
      .dD = of("dD", dD),
      .ddt_bias = of("ddt_bias", ddt_bias)};
  const Lease ctx(of.device());
  krait::ssd_backward(*ctx, args);
}

// The three below make their results in the library: they are copied out.

void ssd_minimal_discrete(Given X, Given A, Given B, Given C, std::int64_t block_len, Given initial_states,
                          Given out, Given final_state) {
  Operands of("ssd_minimal_discrete");
  const Tensor to_out = of("out", out);
  const Tensor to_state = of("final_state", final_state);
  const Tensor x = of("X", X);
  const Tensor a = of("A", A);
  const Tensor b = of("B", B);
  const Tensor c = of("C", C);
  const Tensor initial = of("initial_states", initial_states);
  const Lease ctx(of.device());
  const auto [Y, state] = krait::ssd_minimal_discrete(*ctx, x, a, b, c, block_len, initial);
  if (to_out) ctx->copy(Y, to_out);
  if (to_state) ctx->copy(state, to_state);
}

void copy_out(Context& ctx, const DiscreteSsm& from, const Tensor& X, const Tensor& A) {
  if (X) ctx.copy(from.X, X);
  if (A) ctx.copy(from.A, A);
}

void ssd_discretize(Given x, Given d, Given A, Given X_out, Given A_out) {
  Operands of("ssd_discretize");
  const Tensor continuous = of("x", x);
  const Tensor steps = of("d", d);
  const Tensor decay = of("A", A);
  const Tensor to_x = of("X_out", X_out);
  const Tensor to_a = of("A_out", A_out);
  const Lease ctx(of.device());
  copy_out(*ctx, krait::ssd_discretize(*ctx, continuous, steps, decay), to_x, to_a);
}

void ssd_undiscretize(Given X, Given A, Given d, Given x_out, Given A_out) {
  Operands of("ssd_undiscretize");
  const Tensor discrete = of("X", X);
  const Tensor decay = of("A", A);
  const Tensor steps = of("d", d);
  const Tensor to_x = of("x_out", x_out);
  const Tensor to_a = of("A_out", A_out);
  const Lease ctx(of.device());
  copy_out(*ctx, krait::ssd_undiscretize(*ctx, discrete, decay, steps), to_x, to_a);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(ssd, krait::ffi::ssd)
KRAIT_FFI(ssd_backward, krait::ffi::ssd_backward)
KRAIT_FFI(ssd_minimal_discrete, krait::ffi::ssd_minimal_discrete)
KRAIT_FFI(ssd_discretize, krait::ffi::ssd_discretize)
KRAIT_FFI(ssd_undiscretize, krait::ffi::ssd_undiscretize)
