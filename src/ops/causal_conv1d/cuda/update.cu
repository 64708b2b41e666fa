// One step (or T) of causal_conv1d on a GPU.
#include "ops/causal_conv1d/cuda/runs.cuh"

namespace krait::conv_detail {
namespace {

using cuda::AnyView;
using cuda::IndexView;

struct StepProblem {
  Filter filter;
  AnyView<3> x;      // (B, D, T)
  AnyView<3> state;  // (R, D, S)
  AnyView<3> out;
  IndexView written;  // cache_seqlens
  IndexView indices;
  IndexView seq_idx;
  std::int64_t state_rows = 0;
  std::int64_t channels = 0;
  std::int64_t channel_blocks = 0;
  std::int64_t items = 0;  // batch rows x blocks of channels
  std::int64_t tokens = 0;
  std::int64_t size = 0;  // S
};

// A thread a channel of a batch row. Its line is what is remembered, the oldest first, then the new inputs.
// kTaps 0: any width; otherwise the taps and a single token's window stay in registers.
template <int kTaps>
__global__ void __launch_bounds__(128) step(StepProblem p) {
  for (std::int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
    const std::int64_t row = item / p.channel_blocks;
    const std::int64_t channel = item % p.channel_blocks * blockDim.x + threadIdx.x;
    if (channel >= p.channels) continue;
    std::int64_t slot = p.indices ? p.indices(row) : row;
    if (p.seq_idx && p.seq_idx(row) < 0) slot = -1;
    std::int64_t ring = 0;
    if (p.written) {
      const std::int64_t written = p.written(row);
      if (written < 0) slot = -1;
      ring = p.size > 0 && written >= 0 ? written % p.size : 0;
    }
    if (slot < 0 || slot >= p.state_rows) {
      for (std::int64_t t = 0; t < p.tokens; ++t) p.out.store(0.0F, row, channel, t);
      continue;
    }
    const auto place = [&](std::int64_t j) {
      const std::int64_t at = ring + j;  // j is in [0, S)
      return at >= p.size ? at - p.size : at;
    };
    const auto line = [&](std::int64_t j) {
      return j < p.size ? p.state.load(slot, channel, place(j)) : p.x.load(row, channel, j - p.size);
    };
    const float bias = p.filter.bias_of(channel);

    if constexpr (kTaps > 0) {
      float window[kTaps];
#pragma unroll
      for (int k = 0; k < kTaps - 1; ++k) window[k] = line(p.size - (kTaps - 1) + k);
      for (std::int64_t t = 0; t < p.tokens; ++t) {
        window[kTaps - 1] = p.x.load(row, channel, t);
        float sum = bias;
#pragma unroll
        for (int k = 0; k < kTaps; ++k) sum = fmaf(p.filter.weight.load(channel, k), window[k], sum);
        p.out.store(activate(sum, p.filter.silu), row, channel, t);
#pragma unroll
        for (int k = 0; k < kTaps - 1; ++k) window[k] = window[k + 1];
      }
    } else {
      const int kernel = p.filter.kernel;
      for (std::int64_t t = 0; t < p.tokens; ++t) {
        float sum = bias;
        for (int k = 0; k < kernel; ++k)
          sum = fmaf(p.filter.weight.load(channel, k), line(p.size + t - (kernel - 1) + k), sum);
        p.out.store(activate(sum, p.filter.silu), row, channel, t);
      }
    }

    if (p.written) {
      // Only the new inputs change places of the ring, of more than S the last S.
      for (std::int64_t t = p.tokens > p.size ? p.tokens - p.size : 0; t < p.tokens; ++t)
        p.state.store(p.x.load(row, channel, t), slot, channel, place(t % p.size));
    } else if (p.tokens > 0) {
      // Each place is read before it is written, as the line only moves down.
      for (std::int64_t j = 0; j < p.size; ++j) p.state.store(line(p.tokens + j), slot, channel, j);
    }
  }
}

}  // namespace

void update_cuda(Context& ctx, const StepArgs& args) {
  StepProblem problem{.filter = filter_of(args.weight, args.bias, args.activation),
                      .x = AnyView<3>(args.x),
                      .state = AnyView<3>(args.conv_state),
                      .out = AnyView<3>(args.out),
                      .written = IndexView(args.cache_seqlens),
                      .indices = IndexView(args.conv_state_indices),
                      .seq_idx = IndexView(args.seq_idx),
                      .state_rows = args.conv_state.size(0),
                      .channels = args.x.size(1),
                      .channel_blocks = (args.x.size(1) + 127) / 128,
                      .tokens = args.x.size(2),
                      .size = args.conv_state.size(2)};
  problem.items = args.x.size(0) * problem.channel_blocks;
  if (problem.items == 0) return;
  const unsigned grid = cuda::blocks_for(ctx, problem.items, 1, 64);
  const auto kernel = args.weight.size(1) == 4 ? step<4> : step<0>;
  cuda::launch(ctx, "causal_conv1d_update", kernel, grid, 128, 0, problem);
}

}  // namespace krait::conv_detail
