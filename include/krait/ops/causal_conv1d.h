// causal_conv1d: a short depthwise convolution over time, as in the Mamba blocks (Gu and Dao 2023,
// section 3.4).
//   out_t = act(bias + sum_k weight_k x_{t-K+1+k}),  x_{<0} from initial_states, or 0
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

enum class Activation : std::uint8_t { none, silu };
enum class ConvPath : std::uint8_t { automatic, reference, simd };

struct CausalConv1dArgs {
  Tensor x;               // (B, D, L), any strides (channel-last and channel-first alike)
  Tensor weight;          // (D, K), K >= 1
  Tensor bias;            // (D), optional
  Tensor initial_states;  // (B, D, K-1), optional; (n, D, K-1) with cu_seqlens. Belongs to the sequence that
                          // the row starts with.
  // These three may be on the host or on the context's device.
  Tensor seq_idx;  // (B, L) i32 or i64, optional: taps of another sequence are 0. Where it is -1 the output
                   // is 0 and the windows of later tokens are as if the token were not there.
  Tensor cu_seqlens;  // (n+1) i32 or i64, optional, B = 1: sequence i is [cu_seqlens[i], cu_seqlens[i+1])
  Tensor state_positions;  // (B, M) i32 or i64, optional: windows wanted after those tokens
  Activation activation = Activation::none;
  bool return_final_states = false;
  Tensor out;           // optional destinations; out may not overlap x
  Tensor final_states;  // (B, D, K-1) or (n, D, K-1); may be initial_states itself
  Tensor states;        // (B, M, D, K-1), needs state_positions
  ConvPath path = ConvPath::automatic;
};

struct CausalConv1dResult {
  Tensor out;           // (B, D, L) in x's dtype, strides like x where new
  Tensor final_states;  // the last K-1 of [initial_states, x] of each row or packed sequence; x's dtype where
                        // new
  Tensor states;        // (B, M, D, K-1) with state_positions, x's dtype
};

// Every tensor may be f32, bf16 or f16 in any mixture, but for out, which has x's dtype; f64 beside an x of
// f64, on the reference. Sums are in f32. Throws Error(invalid_argument) that names the tensor, what was
// found and what was expected.
CausalConv1dResult causal_conv1d(Context& ctx, const CausalConv1dArgs& args);

struct CausalConv1dUpdateArgs {
  Tensor x;           // (B, D) or (B, D, T)
  Tensor conv_state;  // (R, D, S), S >= K-1, updated in place
  Tensor weight;      // (D, K)
  Tensor bias;        // (D), optional
  Activation activation = Activation::none;
  Tensor cache_seqlens;       // (B) i32 or i64, optional: the state is a ring written at cache_seqlens % S
  Tensor conv_state_indices;  // (B) i32 or i64, optional: the row of conv_state of each batch row; negative
                              // is a padding slot (output 0, state untouched)
  Tensor seq_idx;             // (B), optional: a negative one is a padding slot too
  Tensor out;                 // optional destination, x's shape
  ConvPath path = ConvPath::automatic;
};

// One (or T) tokens on top of a state; returns x's shape and dtype. On a GPU the index tensors are on the
// device and are not read on the host, so that a step can be recorded: an index beyond the rows of conv_state
// or a negative cache_seqlens is a padding slot there too, and what two batch rows make of one state is not
// defined. On the CPU all three are errors.
Tensor causal_conv1d_update(Context& ctx, const CausalConv1dUpdateArgs& args);

// The last S inputs of each packed sequence, zero padded on the left: x (T, D), cu_seqlens (n+1) -> (n, D,
// S), in `out` where that is given (any float dtype), else in a new tensor of x's dtype.
Tensor causal_conv1d_varlen_states(Context& ctx, const Tensor& x, const Tensor& cu_seqlens,
                                   std::int64_t state_len, const Tensor& out = {});

struct CausalConv1dBackwardArgs {
  Tensor x;  // as in the forward
  Tensor weight;
  Tensor bias;
  Tensor initial_states;
  Tensor seq_idx;
  Tensor cu_seqlens;
  Activation activation = Activation::none;
  Tensor dout;             // (B, D, L)
  Tensor dfinal_states;    // (B, D, K-1) or (n, D, K-1), optional
  Tensor dx;               // (B, D, L), written where given; may be dout itself
  Tensor dweight;          // (D, K) f32, added to where given
  Tensor dbias;            // (D) f32, likewise
  Tensor dinitial_states;  // (B, D, K-1) or (n, D, K-1), written where given; may be dfinal_states itself
  ConvPath path = ConvPath::automatic;
};

// What the activation saw is computed anew. The bits of the result do not depend on the number of threads.
void causal_conv1d_backward(Context& ctx, const CausalConv1dBackwardArgs& args);

}  // namespace krait
