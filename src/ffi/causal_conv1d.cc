#include "krait/ops/causal_conv1d.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"
#include "ffi/words.h"

namespace krait::ffi {
namespace {

void causal_conv1d(Given x, Given weight, Given bias, Given initial_states, Given seq_idx, Given cu_seqlens,
                   Given state_positions, const Word& activation, Given out, Given final_states,
                   Given states) {
  Operands of("causal_conv1d");
  const CausalConv1dArgs args{.x = of("x", x),
                              .weight = of("weight", weight),
                              .bias = of("bias", bias),
                              .initial_states = of("initial_states", initial_states),
                              .seq_idx = of("seq_idx", seq_idx),
                              .cu_seqlens = of("cu_seqlens", cu_seqlens),
                              .state_positions = of("state_positions", state_positions),
                              .activation = activation_of("causal_conv1d", activation),
                              .out = of("out", out),
                              .final_states = of("final_states", final_states),
                              .states = of("states", states)};
  const Lease ctx(of.device());
  krait::causal_conv1d(*ctx, args);
}

void causal_conv1d_update(Given x, Given conv_state, Given weight, Given bias, const Word& activation,
                          Given cache_seqlens, Given conv_state_indices, Given seq_idx, Given out) {
  Operands of("causal_conv1d_update");
  const CausalConv1dUpdateArgs args{.x = of("x", x),
                                    .conv_state = of("conv_state", conv_state),
                                    .weight = of("weight", weight),
                                    .bias = of("bias", bias),
                                    .activation = activation_of("causal_conv1d_update", activation),
                                    .cache_seqlens = of("cache_seqlens", cache_seqlens),
                                    .conv_state_indices = of("conv_state_indices", conv_state_indices),
                                    .seq_idx = of("seq_idx", seq_idx),
                                    .out = of("out", out)};
  const Lease ctx(of.device());
  krait::causal_conv1d_update(*ctx, args);
}

void causal_conv1d_varlen_states(Given x, Given cu_seqlens, std::int64_t state_len, Given out) {
  Operands of("causal_conv1d_varlen_states");
  const Tensor tokens = of("x", x);
  const Tensor offsets = of("cu_seqlens", cu_seqlens);
  const Tensor states = of("out", out);
  const Lease ctx(of.device());
  krait::causal_conv1d_varlen_states(*ctx, tokens, offsets, state_len, states);
}

void causal_conv1d_backward(Given x, Given weight, Given bias, Given initial_states, Given seq_idx,
                            Given cu_seqlens, const Word& activation, Given dout, Given dfinal_states,
                            Given dx, Given dweight, Given dbias, Given dinitial_states) {
  Operands of("causal_conv1d_backward");
  const CausalConv1dBackwardArgs args{.x = of("x", x),
                                      .weight = of("weight", weight),
                                      .bias = of("bias", bias),
                                      .initial_states = of("initial_states", initial_states),
                                      .seq_idx = of("seq_idx", seq_idx),
                                      .cu_seqlens = of("cu_seqlens", cu_seqlens),
                                      .activation = activation_of("causal_conv1d_backward", activation),
                                      .dout = of("dout", dout),
                                      .dfinal_states = of("dfinal_states", dfinal_states),
                                      .dx = of("dx", dx),
                                      .dweight = of("dweight", dweight),
                                      .dbias = of("dbias", dbias),
                                      .dinitial_states = of("dinitial_states", dinitial_states)};
  const Lease ctx(of.device());
  krait::causal_conv1d_backward(*ctx, args);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(causal_conv1d, krait::ffi::causal_conv1d)
KRAIT_FFI(causal_conv1d_update, krait::ffi::causal_conv1d_update)
KRAIT_FFI(causal_conv1d_varlen_states, krait::ffi::causal_conv1d_varlen_states)
KRAIT_FFI(causal_conv1d_backward, krait::ffi::causal_conv1d_backward)
