// state_update: one step of the recurrence of selective_scan and ssd, in place, for decoding.
//   d = clamp(softplus?(dt + dt_bias), dt_limit);  S = exp(d A) S + d B x;  out = (S C + D x) silu(z)
#pragma once

#include <cstdint>
#include <limits>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

// What d is clamped to, after softplus.
struct DtLimit {
  float low = 0.0F;
  float high = std::numeric_limits<float>::infinity();
};

enum class StateUpdatePath : std::uint8_t { automatic, reference, simd };

struct StateUpdateArgs {
  Tensor state;    // (R, H, P, N) or (R, D, N), f32 (or bf16, f16 storage), updated in place
  Tensor x;        // (B, H, P) or (B, D); with T: (B, T, H, P) or (B, T, D)
  Tensor dt;       // like x, or (B, H) / (B, T, H) with a head-wise state
  Tensor A;        // (D, N), (H), or (H, P, N)
  Tensor B;        // (B, N) or (B, G, N); with T (B, T, N) or (B, T, G, N)
  Tensor C;        // like B
  Tensor D;        // (H), (H, P) or (D), optional
  Tensor z;        // like x, optional
  Tensor dt_bias;  // (H), (H, P) or (D), optional
  // (B) i32 or i64, optional: the row of state of each entry, all distinct; negative is a padding slot:
  // output 0, no state touched. Without it R = B.
  Tensor state_batch_indices;
  bool dt_softplus = false;
  DtLimit dt_limit;
  Tensor out;  // optional destination of x's shape and dtype; may be x or z itself
  StateUpdatePath path = StateUpdatePath::automatic;
};

// One step (or T) of the recurrence in place; returns out, in x's dtype. dt_limit applies as in ssd, so that
// step = prefill. The arithmetic is f32 (f64 by the reference where any tensor is f64); a state of bf16 or
// f16 is rounded to nearest once a token, so that T tokens give the bits of T calls. The bits do not depend
// on the number of threads. Throws Error(invalid_argument) for what does not fit, before anything is written.
// On a GPU state_batch_indices is there too, and its values are seen by the kernel alone: one beyond the rows
// of state is a padding slot, and of a row named twice the state is that of either entry. There is no f64.
Tensor state_update(Context& ctx, const StateUpdateArgs& args);

}  // namespace krait
