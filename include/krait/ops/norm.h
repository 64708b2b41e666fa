// Normalisation over the last dimension: RMSNorm (Zhang and Sennrich 2019), LayerNorm (Ba et al. 2016),
// and Mamba-2's gated norms over groups of channels; each with the residual addition fused.
//   r = x + residual (if given);  rms: r / sqrt(mean(r^2) + eps) * weight + bias
//                                 layer: (r - mean(r)) / sqrt(var(r) + eps) * weight + bias
// With a gate z: norm_before_gate ? norm(r) * silu(z) : norm(r * silu(z)).
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

enum class NormPath : std::uint8_t { automatic, reference, simd };
enum class NormKind : std::uint8_t { rms, layer };

struct NormArgs {
  Tensor x;         // (..., C) any strides, f32, bf16, f16 (f64: reference)
  Tensor weight;    // (C), optional (1)
  Tensor bias;      // (C), optional (0)
  Tensor residual;  // (..., C), optional; may be of another dtype than x
  Tensor z;         // (..., C), optional gate
  double eps = 1e-6;
  std::int64_t group_size = 0;  // channels normalised together; 0: all C; must divide C
  bool norm_before_gate = true;
  bool prenorm = false;           // also return r = x + residual
  bool residual_in_fp32 = false;  // r in f32, whatever the dtype of x
  Tensor out;                     // optional destinations; residual_out may be residual itself
  Tensor residual_out;
  NormPath path = NormPath::automatic;
};

struct NormResult {
  Tensor out;       // (..., C), x's dtype unless args.out says otherwise
  Tensor residual;  // (..., C): with prenorm; dtype of residual_out, else f32 with residual_in_fp32, else of
                    // residual where given, else x's
};

NormResult rms_norm(Context& ctx, const NormArgs& args);
NormResult layer_norm(Context& ctx, const NormArgs& args);
NormResult norm(Context& ctx, NormKind kind, const NormArgs& args);

struct NormBackwardArgs {
  Tensor x;       // (..., C) what was normalised: x, or x + residual, which prenorm returns
  Tensor weight;  // as in the forward
  Tensor bias;    // as in the forward: dz with norm_before_gate needs it
  Tensor z;
  double eps = 1e-6;
  std::int64_t group_size = 0;
  bool norm_before_gate = true;
  Tensor dout;        // (..., C)
  Tensor dresidual;   // (..., C), optional: the gradient of the returned residual
  Tensor dx;          // (..., C) of x and of residual alike; may be dout or dresidual itself
  Tensor dx_rounded;  // (..., C), optional: dx once more in a dtype of its own, as products read it
  Tensor dz;          // (..., C); may be dout or z itself
  Tensor dweight;     // (C) f32, added to
  Tensor dbias;       // (C) f32, added to
  NormPath path = NormPath::automatic;
};

// Gradients are written or added to where a destination is given. Statistics are computed anew from x. The
// bits of the result do not depend on the number of threads, nor on a GPU on anything but shapes, layouts and
// the device. f64 anywhere (dweight and dbias may be f64 too) runs on the reference.
void norm_backward(Context& ctx, NormKind kind, const NormBackwardArgs& args);

}  // namespace krait
