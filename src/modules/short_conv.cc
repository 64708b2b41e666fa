#include "modules/short_conv.h"

namespace krait {

Tensor short_conv(Context& ctx, const ConvLayer& conv, const Tensor& x, Activation activation,
                  const Batch& batch, int layer) {
  const Tensor& windows = batch.pool().conv(layer);
  const Tensor weight = conv.weight.squeeze(1);
  if (batch.is_step())
    return causal_conv1d_update(ctx, {.x = x,
                                      .conv_state = windows,
                                      .weight = weight,
                                      .bias = conv.bias,
                                      .activation = activation,
                                      .conv_state_indices = batch.state_indices()});
  const Tensor states = batch.gather(ctx, windows);
  Tensor out = ctx.empty(x.shape());
  causal_conv1d(ctx, {.x = x.transpose(0, 1).unsqueeze(0),
                      .weight = weight,
                      .bias = conv.bias,
                      .initial_states = states,
                      .cu_seqlens = batch.cu_seqlens(),
                      .activation = activation,
                      .return_final_states = true,
                      .out = out.transpose(0, 1).unsqueeze(0),
                      .final_states = states});
  batch.scatter(states, windows);
  return out;
}

}  // namespace krait
