// selective_step: what stands between x_proj and out_proj of a Mamba-1 block that takes one token of each
// sequence: dt_proj and one step of the selective scan.
//   state_update with dt = low_dt W^T
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

struct SelectiveStepArgs {
  Tensor state;                // (R, D, N), updated in place
  Tensor x;                    // (B, D)
  Tensor low_dt;               // (B, rank): x_proj's part that dt_proj multiplies
  Tensor dt_weight;            // (D, rank): dt_proj's
  Tensor dt_bias;              // (D), optional, added in front of the softplus
  Tensor A;                    // (D, N)
  Tensor B;                    // (B, N)
  Tensor C;                    // (B, N)
  Tensor D;                    // (D), optional
  Tensor z;                    // (B, D), optional
  Tensor state_batch_indices;  // (B), optional, as in state_update
  Tensor out;                  // (B, D), optional destination
};

// Returns out, in x's dtype: what linear and state_update with dt_softplus give one after the other, which is
// what it is on the CPU. On a GPU it is one kernel, with dt in f32, where 16-bit weights, an f32 state and a
// few sequences are of the sizes that models have. Throws Error(invalid_argument) as the two do.
Tensor selective_step(Context& ctx, const SelectiveStepArgs& args);

}  // namespace krait
