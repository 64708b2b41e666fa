// Between the files of the GPU's side of selective_scan.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "krait/core/context.h"
#include "ops/selective_scan/scan.h"

namespace krait::scan {

// The length of pieces that leaves runs whole.
inline constexpr std::int64_t kWholeRuns = std::int64_t{1} << 40;

// Writes 0 to padding tokens of those of the tensors (B, D, L) that are there.
void clear_padding(Context& ctx, const Problem& problem, std::initializer_list<const Tensor*> tensors);

// Elements that tensors may have from one token, or one state, to the next where kernels count these in 32
// bits.
inline constexpr std::int64_t kMostApart = 1 << 24;
// True for what the kernels of a Mamba block's call take: softplus, at most 16 states, no padding inside of a
// sequence, and the tensors (B, D, L) all there, of the type of u, with channels side by side, of which four
// can be brought at once.
[[nodiscard]] bool has_channels_together(const Problem& problem,
                                         std::initializer_list<const Tensor*> tensors);

// False where the problem is none for the fast kernels; nothing has been done then.
bool run_fast_forward(Context& ctx, const Problem& problem);
void run_plain_forward(Context& ctx, const Problem& problem);
// The gradient of the state behind each piece of `length` tokens of a row, as (piece, N, D), pieces counted
// from a row's last: what flows in from the pieces behind and from dlast_state. Whole rows without wanted
// states alone; `length` divides theirs.
Tensor gradients_between(Context& ctx, const Problem& problem, const Gradients& gradients,
                         std::int64_t length);
bool run_fast_backward(Context& ctx, const Problem& problem, const Gradients& gradients);
void run_plain_backward(Context& ctx, const Problem& problem, const Gradients& gradients);

// Sums that blocks of channels leave behind, for each token and parameter.
struct PartialSums {
  std::int64_t tiles = 0;  // of channels of a group
  Tensor dB;               // (tiles, B L, G, numbers N) f32, where wanted and variable
  Tensor dC;
  // (pieces, numbers N, D) and (pieces, D)
  std::int64_t pieces = 0;
  Tensor dA;
  Tensor constant_dB;
  Tensor constant_dC;
  Tensor dD;
  Tensor ddelta_bias;
};
PartialSums make_sums(Context& ctx, const Problem& problem, const Gradients& gradients, std::int64_t tiles,
                      std::int64_t pieces);
// Adds or writes them to the gradients, in a fixed order.
void finish_sums(Context& ctx, const Problem& problem, const Gradients& gradients, const PartialSums& sums);

}  // namespace krait::scan
