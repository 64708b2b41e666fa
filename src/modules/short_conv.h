// The short convolution of a mixer over the packed tokens of a batch, on top of the pool's windows.
#pragma once

#include "krait/modules/batch.h"
#include "krait/modules/parameter.h"
#include "krait/modules/tape.h"
#include "krait/ops/causal_conv1d.h"

namespace krait {

// x (T, channels) -> (T, channels); advances the windows of `layer`.
Tensor short_conv(Context& ctx, const ConvLayer& conv, const Tensor& x, Activation activation,
                  const Batch& batch, int layer, Tape* tape = nullptr);

// Writes dx (T, channels), which may be dout itself, and adds to the layer's gradients. x as in the forward.
void short_conv_backward(Context& ctx, const ConvLayer& conv, const Tensor& x, Activation activation,
                         const Batch& batch, int layer, Tape& tape, const Tensor& dout, const Tensor& dx);

// The states of a batch around an operator over time: what it starts from and where it leaves the last
// ones. Absent where the batch has none.
struct EdgeStates {
  Tensor initial;
  Tensor last;
};
// With a tape, the initial states are copied onto it under `name`, so that they outlive the last ones, and a
// forward that runs again starts from the copy and leaves the pool alone.
EdgeStates edge_states(Context& ctx, const Batch& batch, const Tensor& pooled, int layer,
                       std::string_view name, Tape* tape);
// In backward: the copy, or absent.
Tensor kept_initial_states(int layer, std::string_view name, Tape& tape);

}  // namespace krait
