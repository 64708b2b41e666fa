// One step (or T) of causal_conv1d on a GPU.
#include "core/cuda/bits.cuh"
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

// Four neighbours to memory of a dtype known at run time, at once.
__device__ __forceinline__ void store_four(const AnyView<3>& to, std::int64_t at, const float (&v)[4]) {
  if (to.dtype == DType::f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(to.data) + at) = {v[0], v[1], v[2], v[3]};
    return;
  }
  ushort4 bits;
  if (to.dtype == DType::bf16)
    bits = {__bfloat16_as_ushort(cuda::from_float<__nv_bfloat16>(v[0])),
            __bfloat16_as_ushort(cuda::from_float<__nv_bfloat16>(v[1])),
            __bfloat16_as_ushort(cuda::from_float<__nv_bfloat16>(v[2])),
            __bfloat16_as_ushort(cuda::from_float<__nv_bfloat16>(v[3]))};
  else
    bits = {
        __half_as_ushort(cuda::from_float<__half>(v[0])), __half_as_ushort(cuda::from_float<__half>(v[1])),
        __half_as_ushort(cuda::from_float<__half>(v[2])), __half_as_ushort(cuda::from_float<__half>(v[3]))};
  *reinterpret_cast<ushort4*>(static_cast<unsigned short*>(to.data) + at) = bits;
}

// One token, four taps, channels side by side: a thread takes four channels of a batch row, and all that it
// needs is on its way before the first of it is looked at.
__global__ void __launch_bounds__(128) step_packed(const __grid_constant__ StepProblem p) {
  constexpr int kTaps = 4;
  for (std::int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
    const std::int64_t row = item / p.channel_blocks;
    const std::int64_t channel = (item % p.channel_blocks * blockDim.x + threadIdx.x) * 4;
    if (channel >= p.channels) continue;
    const std::int64_t slot = p.indices ? p.indices(row) : row;
    cuda::Bits<4> x_bits;
    cuda::Bits<4 * kTaps> weight_bits;
    cuda::Bits<4> bias_bits = {};
    x_bits.load_packed(p.x.data, p.x.dtype, p.x.offset(row, channel, 0));
    weight_bits.load_packed(p.filter.weight.data, p.filter.weight.dtype, channel * kTaps);
    if (p.filter.bias) bias_bits.load_packed(p.filter.bias.data, p.filter.bias.dtype, channel);
    const std::int64_t out = p.out.offset(row, channel, 0);
    if (slot < 0 || slot >= p.state_rows) {
      store_four(p.out, out, {0.0F, 0.0F, 0.0F, 0.0F});
      continue;
    }
    float* const state = static_cast<float*>(p.state.data) + p.state.offset(slot, channel, 0);
    float4 window[kTaps - 1];
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k)
      window[k] = *reinterpret_cast<const float4*>(state + k * p.state.stride[2]);
    float x[4];
    float weight[4 * kTaps];
    float sum[4];
    x_bits.to_floats(p.x.dtype, x);
    weight_bits.to_floats(p.filter.weight.dtype, weight);
    bias_bits.to_floats(p.filter.bias.dtype, sum);
    const auto add = [&](int k, const float(&inputs)[4]) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] = fmaf(weight[c * kTaps + k], inputs[c], sum[c]);
    };
#pragma unroll
    for (int k = 0; k < kTaps - 1; ++k) add(k, {window[k].x, window[k].y, window[k].z, window[k].w});
    add(kTaps - 1, x);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = activate(sum[c], p.filter.silu);
    store_four(p.out, out, sum);
#pragma unroll
    for (int k = 0; k < kTaps - 2; ++k)
      *reinterpret_cast<float4*>(state + k * p.state.stride[2]) = window[k + 1];
    *reinterpret_cast<float4*>(state + (kTaps - 2) * p.state.stride[2]) = {x[0], x[1], x[2], x[3]};
  }
}

// Channels side by side, four of which may be moved at once whatever the row.
bool in_fours(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) % 4 == 0 &&
         reinterpret_cast<std::uintptr_t>(t.raw()) % (4 * size_of(t.dtype())) == 0;
}

bool fits_packed(const StepArgs& args) {
  const auto aligned = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0; };
  return args.x.size(2) == 1 && args.x.size(1) % 4 == 0 && args.weight.size(1) == 4 &&
         args.conv_state.size(2) == 3 && args.conv_state.dtype() == DType::f32 && !args.cache_seqlens &&
         !args.seq_idx && in_fours(args.x) && in_fours(args.out) && in_fours(args.conv_state) &&
         args.conv_state.stride(2) % 4 == 0 && args.weight.is_contiguous() && aligned(args.weight) &&
         (!args.bias || (args.bias.stride(0) == 1 && aligned(args.bias)));
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
  const bool packed = fits_packed(args);
  if (packed) problem.channel_blocks = (args.x.size(1) / 4 + 127) / 128;
  problem.items = args.x.size(0) * problem.channel_blocks;
  if (problem.items == 0) return;
  const unsigned grid = cuda::blocks_for(ctx, problem.items, 1, 64);
  const auto kernel = packed ? step_packed : args.weight.size(1) == 4 ? step<4> : step<0>;
  cuda::launch(ctx, "causal_conv1d_update", kernel, grid, 128, 0, problem);
}

}  // namespace krait::conv_detail
