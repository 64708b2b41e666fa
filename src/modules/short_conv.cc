#include "modules/short_conv.h"

namespace krait {
namespace {

constexpr std::string_view kStates = "states";  // the frame, which survives a block's recomputation
constexpr std::string_view kWindows = "conv";

Tensor channels_first(const Batch& batch, const Tensor& t) { return batch.fold(t).transpose(1, 2); }

}  // namespace

EdgeStates edge_states(Context& ctx, const Batch& batch, const Tensor& pooled, int layer,
                       std::string_view name, Tape* tape) {
  const Tensor states = batch.gather(ctx, pooled);
  if (tape == nullptr) return {states, states};
  Tape::Frame& frame = tape->frame(layer, kStates);
  if (tape->recomputing()) return {frame[name], {}};
  frame.keep(name, ctx.clone(states));
  return {frame[name], states};
}

Tensor kept_initial_states(int layer, std::string_view name, Tape& tape) {
  const Tape::Frame& frame = tape.frame(layer, kStates);
  return frame.has(name) ? frame[name] : Tensor();
}

Tensor short_conv(Context& ctx, const ConvLayer& conv, const Tensor& x, Activation activation,
                  const Batch& batch, int layer, Tape* tape) {
  const Tensor weight = conv.weight.squeeze(1);
  if (batch.is_step())
    return causal_conv1d_update(ctx, {.x = x,
                                      .conv_state = batch.pool().conv(layer),
                                      .weight = weight,
                                      .bias = conv.bias,
                                      .activation = activation,
                                      .conv_state_indices = batch.state_indices()});
  EdgeStates windows;
  if (batch.has_states()) windows = edge_states(ctx, batch, batch.pool().conv(layer), layer, kWindows, tape);
  Tensor out = ctx.empty(x.shape(), x.dtype());
  causal_conv1d(ctx, {.x = channels_first(batch, x),
                      .weight = weight,
                      .bias = conv.bias,
                      .initial_states = windows.initial,
                      .seq_idx = batch.seq_idx(),
                      .cu_seqlens = batch.cu_seqlens(),
                      .activation = activation,
                      .return_final_states = windows.last.defined(),
                      .out = channels_first(batch, out),
                      .final_states = windows.last});
  if (windows.last) batch.scatter(ctx, windows.last, batch.pool().conv(layer));
  return out;
}

void short_conv_backward(Context& ctx, const ConvLayer& conv, const Tensor& x, Activation activation,
                         const Batch& batch, int layer, Tape& tape, const Tensor& dout, const Tensor& dx) {
  causal_conv1d_backward(ctx, {.x = channels_first(batch, x),
                               .weight = conv.weight.squeeze(1),
                               .bias = conv.bias,
                               .initial_states = kept_initial_states(layer, kWindows, tape),
                               .seq_idx = batch.seq_idx(),
                               .cu_seqlens = batch.cu_seqlens(),
                               .activation = activation,
                               .dout = channels_first(batch, dout),
                               .dx = channels_first(batch, dx),
                               .dweight = conv.dweight ? conv.dweight.squeeze(1) : Tensor(),
                               .dbias = conv.dbias});
}

}  // namespace krait
