// decode_step: one token of one sequence through a whole Mamba-1 or Mamba-2 language model, from its id to
// the logits: embedding, layers of norm and mixer, final norm, head. On a GPU one kernel, which
// docs/ops/decode_step.md describes; it has no other path, so that whoever calls it keeps the layers' own
// operators for what it refuses.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/state_update.h"

namespace krait {

// The sizes that all layers share. Mamba-1 has one group and no heads, Mamba-2 no dt_rank.
struct DecodeSizes {
  bool mamba2 = false;
  std::int64_t layers = 0;
  std::int64_t d_model = 0;
  std::int64_t d_inner = 0;
  std::int64_t d_state = 0;
  std::int64_t heads = 0;
  std::int64_t groups = 1;
  std::int64_t dt_rank = 0;
  std::int64_t vocabulary = 0;
};

// What a mixer computes beside its products.
struct DecodeOptions {
  bool gated_norm =
      false;  // Mamba-2: norm(y silu(z)) in front of out_proj rather than a gate in the recurrence
  bool norm_before_gate = false;  // norm(y) silu(z)
  double gated_norm_eps = 1e-5;
  bool D_by_channel = false;             // Mamba-2: D (d_inner) rather than (heads)
  DtLimit dt_limit;                      // Mamba-2
  std::optional<double> mixer_norm_eps;  // Mamba-1: norms without weights over dt, B and C
};

// The operands of a layer. Matrices of one 16-bit dtype, contiguous; everything else f32 and contiguous, but
// the states, which are those of a StatePool.
struct DecodeLayer {
  Tensor norm_weight;  // (d_model)
  Tensor norm_bias;    // (d_model), optional
  Tensor in_weight;  // Mamba-1 (2 d_inner, d_model): x, z; Mamba-2 (2 d_inner + 2 G N + H, d_model): z, x, B,
                     // C, dt
  Tensor in_bias;    // (its rows), optional
  Tensor conv_weight;        // (channels, 4): x, or x, B and C
  Tensor conv_bias;          // (channels), optional
  Tensor conv_state;         // (R, channels, 3) f32, updated
  Tensor x_weight;           // Mamba-1: (dt_rank + 2 N, d_inner)
  Tensor dt_weight;          // Mamba-1: (d_inner, dt_rank)
  Tensor dt_bias;            // (d_inner) or (H), optional
  Tensor A;                  // (d_inner, N) or (H), negative
  Tensor D;                  // (d_inner) or (H), optional
  Tensor ssm_state;          // (R, d_inner, N) or (R, H, P, N) of f32, bf16 or f16, updated
  Tensor gated_norm_weight;  // (d_inner), with gated_norm
  Tensor out_weight;         // (d_model, d_inner)
  Tensor out_bias;           // (d_model), optional
};

struct DecodeModel {
  DecodeSizes sizes;
  DecodeOptions options;
  bool rms = true;  // RMSNorm in front of each layer and of the head, else LayerNorm
  double eps = 1e-5;
  std::vector<DecodeLayer> layers;
};

struct DecodeStepArgs {
  DecodeModel model;
  Tensor id;           // (1) i64: one outside of the vocabulary counts as zeros
  Tensor row;          // (1) i64, of the states: -1 is a padding slot, whose states stay as they are
  Tensor embedding;    // (V, d_model) of the matrices' dtype
  Tensor norm_weight;  // the final norm's
  Tensor norm_bias;    // optional
  Tensor head;         // (V, d_model)
  Tensor logits;       // (1, V) f32, written
};

// False where device, sizes, dtypes or layouts are not made for the kernel, with nothing done. Results are
// those of the layers' operators one after the other, rounded where they round.
[[nodiscard]] bool decode_step(Context& ctx, const DecodeStepArgs& args);

}  // namespace krait
