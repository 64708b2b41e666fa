// What ssd_backward hands to its paths: shapes fit, dtypes are allowed.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "ops/ssd/problem.h"

namespace krait::ssd_detail {

struct BackwardProblem {
  Problem forward;       // its inputs, its runs and the chunk size
  Tensor dout;           // (B, L, H, P)
  Tensor dfinal_states;  // (sequences, H, P, N) or absent
  // Written; places of padding tokens are left alone by the chunked path. Absent: not wanted.
  Tensor dx, ddt, dB, dC, dz;
  Tensor dinitial_states;
  // Added to. Absent: not wanted.
  Tensor dA;        // (H)
  Tensor dD;        // (H) or (H, P)
  Tensor ddt_bias;  // (H)

  // The gradient of the step sizes is wanted for something.
  [[nodiscard]] bool steps() const { return ddt || dA || ddt_bias; }
};

void run_reference_backward(Context& ctx, const BackwardProblem& problem);
// A, D and dt_bias of `forward` are contiguous f32.
void run_chunked_backward(Context& ctx, const BackwardProblem& problem);

// How a batch is cut, by its shape alone: dB and dC are sums over blocks of heads, so that a division by
// threads would change their bits.
struct BackwardCut {
  std::int64_t chunk_size;  // of tokens
  std::int64_t heads;       // of one group that are walked together
};
// `independent`: runs times groups. `longest`: tokens of the longest run. `chunk_size`: 0 or the one to take.
[[nodiscard]] BackwardCut choose_backward(std::int64_t independent, std::int64_t longest,
                                          std::int64_t heads_per_group, std::int64_t headdim,
                                          std::int64_t d_state, std::int64_t chunk_size);

}  // namespace krait::ssd_detail
