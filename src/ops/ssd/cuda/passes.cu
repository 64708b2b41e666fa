// What goes over the segments of runs: decays, states and gradients handed from one to the next.
#include <algorithm>

#include "ops/ssd/cuda/inputs.cuh"

namespace krait::ssd_detail {
namespace {

constexpr int kThreads = 256;

// A warp for each segment and head.
__global__ void decays_kernel(Inputs in, Segments segments, float* decays) {
  const std::int64_t total = segments.count * in.heads;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t warps = std::int64_t{gridDim.x} * (kThreads / 32);
  for (std::int64_t i = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; i < total;
       i += warps) {
    const std::int64_t h = i % in.heads;
    const Segment segment = segments.at(i / in.heads);
    double sum = 0.0;
    for (std::int64_t t = lane; t < segment.count; t += 32)
      sum += static_cast<double>(step_of(in, segment.row, segments.position(segment, t), h).exponent);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, step);
    if (lane == 0) decays[i] = expf(static_cast<float>(sum));
  }
}

// A thread for each run and element of its states.
__global__ void pass_states_kernel(Inputs in, Segments segments, const float* decays, float* ends) {
  const std::int64_t state = in.headdim * in.d_state;
  const std::int64_t all = in.heads * state;
  const std::int64_t total = segments.runs * all;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t h = i % all / state;
    const std::int64_t end = segments.first(i / all + 1);
    float S = 0.0F;
    for (std::int64_t s = segments.first(i / all); s < end; ++s) {
      const Segment segment = segments.at(s);
      if (segment.initial && in.initial)
        S = in.initial.load(segment.sequence, h, i % state / in.d_state, i % in.d_state);
      float& at = ends[s * all + i % all];
      const float added = segment.run_ends ? 0.0F : at;
      at = S;
      S = decays[s * in.heads + h] * S + added;
    }
  }
}

__global__ void pass_gradients_kernel(Inputs in, Segments segments, const float* decays, AnyView<4> dfinal,
                                      AnyView<4> dinitial, float* ends) {
  const std::int64_t state = in.headdim * in.d_state;
  const std::int64_t all = in.heads * state;
  const std::int64_t total = segments.runs * all;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t h = i % all / state;
    const std::int64_t q = i % state / in.d_state;
    const std::int64_t n = i % in.d_state;
    const std::int64_t begin = segments.first(i / all);
    float G = 0.0F;
    for (std::int64_t s = segments.first(i / all + 1) - 1; s >= begin; --s) {
      const Segment segment = segments.at(s);
      if (segment.final && dfinal) G = dfinal.load(segment.sequence, h, q, n);
      float& at = ends[s * all + i % all];
      const bool wanted = !segment.run_begins || (segment.initial && dinitial);
      const float added = wanted ? at : 0.0F;
      at = G;
      G = decays[s * in.heads + h] * G + added;
      // What nothing is left of is 0, not -0.
      if (segment.initial && dinitial) dinitial.store(G + 0.0F, segment.sequence, h, q, n);
    }
  }
}

__global__ void clear_kernel(Segments segments, AnyView<4> t, std::int64_t rows, std::int64_t columns) {
  const std::int64_t total = segments.padding_count * rows * columns;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total;
       i += std::int64_t{gridDim.x} * kThreads) {
    const TokenRuns::Token token = segments.padding[i / (rows * columns)];
    t.store(0.0F, token.row, token.position, i / columns % rows, i % columns);
  }
}

}  // namespace

void segment_decays(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& decays) {
  const std::int64_t warps = segments.count * in.heads;
  if (warps == 0) return;
  cuda::launch(ctx, "ssd decays of segments", decays_kernel, cuda::blocks_for(ctx, warps, kThreads / 32),
               kThreads, 0, in, segments, decays.data<float>());
}

void pass_states(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& decays,
                 const Tensor& ends) {
  const std::int64_t total = segments.runs * in.heads * in.headdim * in.d_state;
  if (total == 0) return;
  cuda::launch(ctx, "ssd states over segments", pass_states_kernel, cuda::blocks_for(ctx, total, kThreads),
               kThreads, 0, in, segments, decays.data<float>(), ends.data<float>());
}

void pass_gradients(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& decays,
                    const Tensor& final_gradient, const Tensor& initial_gradient, const Tensor& ends) {
  const std::int64_t total = segments.runs * in.heads * in.headdim * in.d_state;
  if (total == 0) return;
  cuda::launch(ctx, "ssd gradients over segments", pass_gradients_kernel,
               cuda::blocks_for(ctx, total, kThreads), kThreads, 0, in, segments, decays.data<float>(),
               AnyView<4>(final_gradient), AnyView<4>(initial_gradient), ends.data<float>());
}

void clear_padding(Context& ctx, const Segments& segments, const Tensor& t) {
  const std::int64_t total = segments.padding_count * t.size(2) * t.size(3);
  if (total == 0) return;
  cuda::launch(ctx, "ssd padding", clear_kernel, cuda::blocks_for(ctx, total, kThreads), kThreads, 0,
               segments, AnyView<4>(t), t.size(2), t.size(3));
}

}  // namespace krait::ssd_detail
