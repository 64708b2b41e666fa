// Rotary position embedding (Su et al. 2021, "RoFormer"): pairs of channels turn by
// position * base^(-2i / dim).
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

enum class RotaryPath : std::uint8_t { automatic, reference, simd };

struct RotaryArgs {
  Tensor x;                  // (T, H, head_dim) f32, bf16, f16 (f64: reference), any strides; turned in place
  Tensor positions;          // (T) i64 or i32, each below 2^32 in magnitude
  std::int64_t dim = 0;      // the first `dim` channels turn; even, at most head_dim
  double base = 10000.0;     // > 0
  bool interleaved = false;  // pairs (2i, 2i+1) instead of (i, i + dim/2)
  bool inverse = false;      // turn backwards (the gradient)
  RotaryPath path = RotaryPath::automatic;
};

// Angles are computed and reduced in f64: large positions lose nothing. On a GPU positions are on the device
// and are not read on the host: one of 2^32 or more is no error there, and its angle loses digits.
void rotary_embedding(Context& ctx, const RotaryArgs& args);

}  // namespace krait
