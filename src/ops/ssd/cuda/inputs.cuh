// What the kernels of ssd read, and the step of a token.
#pragma once

#include <cstdint>

#include "core/cuda/elements.cuh"
#include "ops/ssd/cuda/segments.h"
#include "ops/ssd/problem.h"

namespace krait::ssd_detail {

using cuda::AnyView;

struct Inputs {
  AnyView<4> x, B, C, z, initial;
  AnyView<3> dt;
  AnyView<2> D;
  AnyView<1> A, dt_bias;
  std::int64_t heads, headdim, d_state, groups, heads_per_group;
  bool dt_softplus, discrete;
  float low, high;

  explicit Inputs(const Problem& p)
      : x(p.x),
        B(p.B),
        C(p.C),
        z(p.z),
        initial(p.initial_states),
        dt(p.dt),
        D(p.D),
        A(p.A),
        dt_bias(p.dt_bias),
        heads(p.heads()),
        headdim(p.headdim()),
        d_state(p.d_state()),
        groups(p.groups()),
        heads_per_group(p.heads_per_group()),
        dt_softplus(p.dt_softplus),
        discrete(p.discrete),
        low(p.dt_limit.low),
        high(p.dt_limit.high) {}
};

// d of a token, the exponent d A of its decay, and the derivative of d by dt.
struct Step {
  float d = 0.0F;
  float exponent = 0.0F;
  float slope = 0.0F;
};

__device__ __forceinline__ Step step_from(const Inputs& in, float dt, float bias, float rate) {
  if (in.discrete) return {1.0F, dt, 1.0F};
  const float raw = dt + bias;
  float d = raw;
  float slope = 1.0F;
  if (in.dt_softplus) {
    d = cuda::softplus(raw);
    slope = raw <= 20.0F ? cuda::sigmoid(raw) : 1.0F;
  }
  // NaN is neither below nor above.
  if (d < in.low || d > in.high) {
    d = d < in.low ? in.low : in.high;
    slope = 0.0F;
  }
  return {d, d * rate, slope};
}

__device__ __forceinline__ float bias_of(const Inputs& in, std::int64_t head) {
  return in.dt_bias ? in.dt_bias.load(head) : 0.0F;
}
__device__ __forceinline__ float rate_of(const Inputs& in, std::int64_t head) {
  return in.A ? in.A.load(head) : 0.0F;
}

__device__ __forceinline__ Step step_of(const Inputs& in, std::int64_t row, std::int64_t position,
                                        std::int64_t head) {
  return step_from(in, in.dt.load(row, position, head), bias_of(in, head), rate_of(in, head));
}

// Kernels of the passes over segments (passes.cu).

// decays[s, h] = exp of the sum of the exponents of segment s.
void segment_decays(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& decays);
// `ends` (segments, H, P, N): from what each segment adds to the state to the state before each segment.
void pass_states(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& decays,
                 const Tensor& ends);
// The same for the gradient: from what each segment adds to the gradient by the state before it, to the
// gradient by the state after each. That by the state before a sequence is written to `initial` if present.
void pass_gradients(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& decays,
                    const Tensor& final_gradient, const Tensor& initial_gradient, const Tensor& ends);
// Sets `t` (B, L, n, m) to 0 for padding tokens.
void clear_padding(Context& ctx, const Segments& segments, const Tensor& t);

// What each segment adds to the state after it, from 0: `ends` (segments, H, P, N). Nothing is written for
// the last segment of a run.
void walk_ends(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& ends);
// What each segment adds to the gradient by the state before it, from 0 after it. Nothing is written for the
// first segment of a run where `initial` is false.
void walk_gradient_ends(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& dout,
                        bool initial, const Tensor& ends);
// The outputs and states. `starts`: the state before each segment, absent where no run is cut.
void walk_outputs(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& starts,
                  const Problem& p);

// The same as walk_ends and walk_outputs on tensor cores, for what suits_tensor_cores.
void chunked_ends(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& ends);
void chunked_outputs(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& starts,
                     const Problem& p);

// `states` where they are absent or in f32 and in pairs, else a copy that is.
[[nodiscard]] Tensor as_pairs(Context& ctx, const Tensor& states);
// Outputs and states by blocks that stay, for what suits_warpgroups and has f32 states in pairs of columns.
// `chunks`: runs cut into pieces of kChunk.
void persistent_outputs(Context& ctx, const Inputs& in, const Segments& chunks, std::int64_t blocks,
                        const Problem& p);

}  // namespace krait::ssd_detail
