// attention: softmax(scale * Q K^T) V with grouped queries, over a key and value cache.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

enum class AttentionPath : std::uint8_t { automatic, reference, simd };

struct AttentionArgs {
  Tensor q;             // (Lq, H, head_dim), any strides
  Tensor k;             // (Lk, Hkv, head_dim); H is a multiple of Hkv, query head h uses h / (H / Hkv)
  Tensor v;             // (Lk, Hkv, head_dim_v)
  bool causal = false;  // query i sees keys 0 .. Lk - Lq + i: the queries are the last Lq positions
  double scale = 0.0;   // 0: head_dim^-0.5
  Tensor out;           // (Lq, H, head_dim_v), optional destination
  Tensor logsumexp;     // (Lq, H) f32 (f64: reference), optional destination: of the scaled scores;
                        // -infinity without keys
  AttentionPath path = AttentionPath::automatic;
};

// One sequence. Softmax and sums in f32, never all Lq x Lk scores at once. Returns q's dtype.
// Requires Lk >= Lq when causal.
Tensor attention(Context& ctx, const AttentionArgs& args);

struct AttentionBackwardArgs {
  Tensor q;  // as in the forward
  Tensor k;
  Tensor v;
  bool causal = false;
  double scale = 0.0;
  Tensor out;        // (Lq, H, head_dim_v) of the forward
  Tensor logsumexp;  // (Lq, H) of the forward
  Tensor dout;       // (Lq, H, head_dim_v)
  Tensor dq;         // (Lq, H, head_dim), each written where given
  Tensor dk;         // (Lk, Hkv, head_dim)
  Tensor dv;         // (Lk, Hkv, head_dim_v)
  AttentionPath path = AttentionPath::automatic;
};

// Scores are recomputed block by block (Dao et al. 2022, "FlashAttention", algorithm 4). Sums in f32; the
// tensors may have dtypes of their own, and where any is f64 the reference computes in f64. The bits of the
// result do not depend on the number of threads. Throws Error(invalid_argument) for what does not fit.
void attention_backward(Context& ctx, const AttentionBackwardArgs& args);

}  // namespace krait
