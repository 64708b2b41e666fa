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
  AttentionPath path = AttentionPath::automatic;
};

// One sequence. Softmax and sums in f32, never all Lq x Lk scores at once. Returns q's dtype.
// Requires Lk >= Lq when causal.
Tensor attention(Context& ctx, const AttentionArgs& args);

}  // namespace krait
