// What the kernels of the backward write, and those on tensor cores.
#pragma once

#include <cstdint>

#include "ops/ssd/backward.h"
#include "ops/ssd/cuda/inputs.cuh"
#include "ops/ssd/kernels.h"

namespace krait::ssd_detail {

// Sums that several blocks have a part of. Absent: not wanted.
struct Sums {
  float* dB = nullptr;        // (parts, B, L, G, N)
  float* dC = nullptr;        // likewise
  float* dA = nullptr;        // (segments, H)
  float* ddt_bias = nullptr;  // (segments, H)
  float* dD = nullptr;        // (segments, H, P); by head, (segments, H), in chunked_backward
  std::int64_t parts = 1;
  std::int64_t stride = 0;  // from one part to the next
};

struct Gradients {
  AnyView<4> dx, dz;
  AnyView<3> ddt;
  AnyView<4> dB, dC;  // where the blocks of warpgroup_backward have all of these sums, in place of Sums
};

// Tokens that a block of one of the backward's kernels has.
#ifdef __HIP_PLATFORM_AMD__
inline constexpr int kBackwardSegment = 32;  // there are 64 KB of shared memory
#else
inline constexpr int kBackwardSegment = kChunk;
#endif

// All gradients, token by token, for any shape, strides and dtypes: `starts` (segments, H, P, N) is the state
// before each segment, `ends` the gradient by the state after it. Of dB and dC adds to what is there.
void token_backward(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& dout,
                    const Tensor& starts, const Tensor& ends, const Gradients& to, const Sums& sums);

// On tensor cores, for what suits_tensor_cores. What each segment adds to the gradient by the state before
// it, as walk_gradient_ends.
void chunked_gradient_ends(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& dout,
                           bool initial, const Tensor& ends);
// `states` (chunks, H, P, N), in x's dtype: the state before each chunk, from `starts`, the state before each
// segment. `gradients`: the gradient by the state after each chunk, from that by the state after each
// segment.
void chunk_states(Context& ctx, const Inputs& in, const Segments& segments, const Segments& chunks,
                  const Tensor& starts, const Tensor& states);
void chunk_gradients(Context& ctx, const Inputs& in, const Segments& segments, const Segments& chunks,
                     const Tensor& dout, const Tensor& starts, const Tensor& gradients);
// All gradients, chunk by chunk. D is by head.
void chunked_backward(Context& ctx, const Inputs& in, const Segments& chunks, const Tensor& dout,
                      const Tensor& states, const Tensor& gradients, const Gradients& to, const Sums& sums);
// What blocks of the two take, in bytes of shared memory.
[[nodiscard]] int chunked_backward_shared_memory();

// The same on products of warpgroups (compute capability 9.0a). Of each chunk, head and 64 channels the state
// before it and the gradient by the state after it, in x's dtype: images of tiles in shared memory.
struct StateTiles {
  Tensor starts;  // (segments, H, P, N) f32: the state before each segment, and
  Tensor ends;    // the gradient by the state after it; absent where no run is cut
  Tensor states;  // (chunks, H, P / 64, 64 * columns)
  Tensor gradients;
};
[[nodiscard]] std::int64_t warpgroup_columns(std::int64_t d_state);
// The gradient by initial states is written too, where no run is cut.
void warpgroup_states(Context& ctx, const Inputs& in, const Segments& segments, const Segments& chunks,
                      const BackwardProblem& b, const StateTiles& tiles);
void warpgroup_backward(Context& ctx, const Inputs& in, const Segments& chunks, const BackwardProblem& b,
                        const StateTiles& tiles, const Gradients& to, const Sums& sums);
// What blocks of the two take, in bytes of shared memory.
[[nodiscard]] int warpgroup_backward_shared_memory();
[[nodiscard]] int warpgroup_states_shared_memory();

}  // namespace krait::ssd_detail
