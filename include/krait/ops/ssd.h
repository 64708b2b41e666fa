// ssd: Mamba-2's state-space duality (Dao and Gu 2024, "Transformers are SSMs", sections 6 and 7).
//   d_t = clamp(softplus?(dt_t + dt_bias), dt_limit)
//   S_t = exp(d_t A_h) S_{t-1} + d_t x_t B_t^T      (headdim x d_state for each head)
//   y_t = S_t C_t + D x_t;   out_t = y_t silu(z_t) where z is given
#pragma once

#include <cstdint>
#include <utility>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/state_update.h"

namespace krait {

enum class SsdPath : std::uint8_t {
  automatic,
  reference,  // the recurrence, plain loops; f64 where the inputs are f64
  recurrent,  // the recurrence, SIMD: short sequences
  chunked,    // chunks of chunk_size steps on matrix products
};

struct SsdArgs {
  Tensor x;               // (B, L, H, P) f32, bf16, f16 (f64: reference), any strides
  Tensor dt;              // (B, L, H)
  Tensor A;               // (H) f32, negative
  Tensor B;               // (B, L, G, N); head h uses group h / (H / G)
  Tensor C;               // (B, L, G, N)
  Tensor D;               // (H) or (H, P), optional
  Tensor z;               // (B, L, H, P), optional
  Tensor dt_bias;         // (H), optional
  Tensor initial_states;  // (B, H, P, N), optional; (n, H, P, N) with cu_seqlens
  Tensor seq_idx;  // (B, L) i32 or i64, optional: the state restarts from 0 where it changes; -1 yields 0 and
                   // leaves the state untouched. initial_states belong to the row's first sequence.
  Tensor cu_seqlens;       // (n+1) i32 or i64, optional, B = 1
  Tensor state_positions;  // (B, M) i32 or i64, optional: states wanted after those tokens
  bool dt_softplus = false;
  DtLimit dt_limit;
  bool reverse = false;         // t runs from L-1 to 0 (within each sequence)
  std::int64_t chunk_size = 0;  // 0: chosen from the shape; chunks are never longer than 256. The result
                                // depends on it by rounding only.
  bool return_final_states = false;
  Tensor out;           // optional destinations, which may not overlap the inputs
  Tensor final_states;  // (B, H, P, N) or (n, H, P, N); may be initial_states itself
  Tensor states;        // (B, M, H, P, N), needs state_positions
  SsdPath path = SsdPath::automatic;
};

struct SsdResult {
  Tensor out;           // (B, L, H, P) in x's dtype, contiguous where new
  Tensor final_states;  // f32 (f64 where x is f64), one for each row or packed sequence
  Tensor states;        // (B, M, H, P, N) with state_positions, likewise
};

// Inputs may be f32, bf16 or f16 in any mixture, f64 beside an x of f64 on the reference. Sums and states are
// in f32. Throws Error(invalid_argument) that names the tensor, what was found and what was expected.
SsdResult ssd(Context& ctx, const SsdArgs& args);

// The path and chunk size that `automatic` takes.
struct SsdChoice {
  SsdPath path;
  std::int64_t chunk_size;
};
SsdChoice choose_ssd(std::int64_t length, std::int64_t headdim, std::int64_t d_state);

// Listing 1 of the paper. X (B, L, H, P) already multiplied by d; A (B, L, H) already multiplied by d; B, C
// (B, L, H, N); initial_states (B, 1, H, P, N), optional; any L. Returns (Y, final_state (B, H, P, N)).
std::pair<Tensor, Tensor> ssd_minimal_discrete(Context& ctx, const Tensor& X, const Tensor& A,
                                               const Tensor& B, const Tensor& C, std::int64_t block_len,
                                               const Tensor& initial_states = {});

// continuous -> discrete: X = d x, A = d A_h. d is dt after bias, softplus and limits.
struct DiscreteSsm {
  Tensor X;  // (B, L, H, P)
  Tensor A;  // (B, L, H)
};
DiscreteSsm ssd_discretize(Context& ctx, const Tensor& x, const Tensor& d, const Tensor& A);
// discrete -> continuous: x = X / d, A_h = A / d at each position, (B, L, H); d must not be 0.
DiscreteSsm ssd_undiscretize(Context& ctx, const Tensor& X, const Tensor& A, const Tensor& d);

struct SsdBackwardArgs {
  SsdArgs forward;       // as given to ssd; destinations and state_positions are not used
  Tensor dout;           // (B, L, H, P)
  Tensor dfinal_states;  // like final_states, optional: the gradient that comes through them
  // Written where given, any float dtype and strides, none overlapping another or an input:
  Tensor dx;               // (B, L, H, P)
  Tensor ddt;              // (B, L, H); 0 where dt_limit clamps
  Tensor dB;               // (B, L, G, N)
  Tensor dC;               // (B, L, G, N)
  Tensor dz;               // (B, L, H, P)
  Tensor dinitial_states;  // like initial_states; may be dfinal_states itself
  // Added to where given, f32 (f64: reference):
  Tensor dA;        // (H)
  Tensor dD;        // (H) or (H, P), as D
  Tensor ddt_bias;  // (H)
};

// Works on chunks, whichever of the fast paths the forward took; the states between them are recomputed and
// kept for one sequence and some of its heads at a time. The bits of the result do not depend on the number
// of threads. Throws as ssd does.
void ssd_backward(Context& ctx, const SsdBackwardArgs& args);

}  // namespace krait
