// selective_scan: Mamba-1's recurrence (Gu and Dao 2023, "Mamba", algorithm 2).
//   d_t = softplus?(delta_t + delta_bias)
//   h_t = exp(d_t A) h_{t-1} + d_t B_t u_t        for each channel d and state n
//   y_t = sum_n C_t h_t  (2 Re of it where A is complex);  out_t = (y_t + D u_t) silu(z_t)
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

enum class ScanPath : std::uint8_t {
  automatic,
  reference,  // plain loops; f64 where the inputs are f64
  simd,       // lanes over channels, states in registers, vectorised exp
};

struct SelectiveScanArgs {
  Tensor u;      // (B, D, L) f32, bf16, f16 (f64: reference), any strides
  Tensor delta;  // (B, D, L)
  Tensor A;      // (D, N) f32 or c64 (f64, c128: reference)
  // Each constant (D, N), complex where A is, or variable (B, N, L) or (B, G, N, L); where A is complex a
  // variable one has 2L numbers, real and imaginary parts interleaved. G divides D; channel d uses group
  // d / (D / G). B and C have the same G, or one of them 1.
  Tensor B;
  Tensor C;
  Tensor D;              // (D), optional
  Tensor z;              // (B, D, L), optional
  Tensor delta_bias;     // (D), optional
  Tensor initial_state;  // (B, D, N), optional; (n, D, N) with cu_seqlens; complex where A is
  Tensor seq_idx;  // (B, L) i32 or i64, optional: the state restarts from 0 where it changes; -1 yields 0 and
                   // leaves the state untouched. initial_state belongs to the row's first sequence.
  Tensor cu_seqlens;       // (n+1) i32 or i64, optional, B = 1; excludes seq_idx
  Tensor state_positions;  // (B, M) i32 or i64, optional: states wanted after those tokens
  bool delta_softplus = false;
  bool reverse = false;  // t runs from L-1 to 0 (within each sequence)
  bool return_last_state = false;
  bool return_checkpoints = false;  // for selective_scan_backward
  Tensor out;                       // optional destination in u's dtype; may be u or z itself
  Tensor last_state;   // optional destination, (B, D, N) or (n, D, N); may be initial_state itself
  Tensor states;       // optional destination, (B, M, D, N), needs state_positions
  Tensor checkpoints;  // optional destination, selective_scan_checkpoints_shape; not on the reference path
  ScanPath path = ScanPath::automatic;
};

struct SelectiveScanResult {
  Tensor out;  // (B, D, L) in u's dtype, laid out in memory like u where new
  Tensor
      last_state;  // after the last token of each row or packed sequence, f32 or c64 (f64, c128: reference)
  Tensor states;   // (B, M, D, N) with state_positions
  // With return_checkpoints or their destination: states every few dozen tokens (K, N, D), f32 or c64, which
  // spare selective_scan_backward a walk over all tokens. The reference path leaves it absent.
  Tensor checkpoints;
};

// Accumulation and state in f32; 64-bit offsets; L, B, D, N may be 0. The bits of the result do not depend on
// the number of threads. The inputs may have dtypes of their own; where any of them is f64 or c128, the
// reference computes in f64. On a GPU there is no f64, path is automatic, and seq_idx, cu_seqlens and
// state_positions may be on the host or on the device (which is waited for then). Throws
// Error(invalid_argument) for shapes, dtypes or sequences that do not fit.
SelectiveScanResult selective_scan(Context& ctx, const SelectiveScanArgs& args);

// (K, N, D) of a destination for the checkpoints of u with shape (B, D, L), for all seq_idx and cu_seqlens
// alike: the more sequences share a row, the fewer of the K are written. `device` is where the context works.
[[nodiscard]] Dims selective_scan_checkpoints_shape(const Dims& u, std::int64_t d_state, bool complex,
                                                    Device::Kind device);

struct SelectiveScanBackwardArgs {
  SelectiveScanArgs forward;  // as given to selective_scan; destinations and state_positions are not used
  Tensor dout;                // (B, D, L)
  Tensor dlast_state;         // like last_state, optional: the gradient that comes through it
  Tensor checkpoints;         // as selective_scan returned them for these arguments; absent: computed again
  // Written where given, any float dtype and strides, none overlapping another or an input:
  Tensor du;              // (B, D, L)
  Tensor ddelta;          // (B, D, L)
  Tensor dz;              // (B, D, L)
  Tensor dinitial_state;  // like initial_state; may be dlast_state itself
  // Like B and C: written where they are variable, added to where they are constant. Where A is complex they
  // are laid out as B and C are, and a complex gradient is d/d(re) + i d/d(im), as PyTorch defines it.
  Tensor dB;
  Tensor dC;
  // Added to where given, f32 or c64 (f64, c128: reference):
  Tensor dA;           // (D, N)
  Tensor dD;           // (D)
  Tensor ddelta_bias;  // (D)
};

// States are recomputed from checkpoints, a few dozen tokens at a time; without `checkpoints` each thread
// walks to those of the 64 channels at its hands first. Beside them memory holds sums for dB and dC, at most
// 32 times the larger of the two, and for dA. The bits of the result do not depend on the number of threads.
// A GPU has checkpoints of its own, every 32 tokens, and sums of D / 32 to D / 8 times the size of dB and dC.
void selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args);

}  // namespace krait
