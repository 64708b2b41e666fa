// projection: a product with what stands around it in a block that takes one token of each sequence: the norm
// in front of in_proj or out_proj, and the short convolution behind in_proj.
//   r = x + residual;  out = norm(r) W^T + b;  convolved = conv_update(columns of out)
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/causal_conv1d.h"

namespace krait {

enum class ProjectionNorm : std::uint8_t { none, rms, layer };

// As NormArgs.
struct ProjectionInput {
  ProjectionNorm norm = ProjectionNorm::none;
  Tensor weight;    // (in), optional
  Tensor bias;      // (in), optional
  Tensor residual;  // (B, in) f32, optional
  Tensor z;         // (B, in), optional gate; not beside a residual
  double eps = 1e-5;
  std::int64_t group_size = 0;
  bool norm_before_gate = true;
  bool return_residual = false;
};

// As CausalConv1dUpdateArgs, over the columns [first, first + D) of out.
struct ProjectionConv {
  Tensor conv_state;  // (R, D, S), updated in place; absent: no convolution
  Tensor weight;      // (D, K)
  Tensor bias;        // (D), optional
  Tensor conv_state_indices;
  std::int64_t first = 0;
  Activation activation = Activation::silu;
};

struct ProjectionArgs {
  Tensor x;  // (B, in)
  ProjectionInput input;
  Tensor weight;  // (out, in)
  Tensor bias;    // (out), optional
  Tensor out;     // (B, out), optional destination
  ProjectionConv conv;
};

struct ProjectionResult {
  Tensor out;        // (B, out), x's dtype where new
  Tensor residual;   // (B, in) f32, with return_residual: x + residual
  Tensor convolved;  // (B, D) in out's dtype, with a convolution
};

// What norm, linear and causal_conv1d_update give one after the other; that is what it is on the CPU. On a
// GPU it is one kernel for a few rows of x whose dtype is that of 16-bit weights, where what is multiplied is
// rounded to that dtype as norm would round it. Throws Error(invalid_argument) as the three do.
ProjectionResult projection(Context& ctx, const ProjectionArgs& args);

// Rows of x up to which a GPU normalises in front of each block's part of the product rather than once: the
// blocks all compute the same.
inline constexpr std::int64_t kMostProjectionRows = 4;

}  // namespace krait
