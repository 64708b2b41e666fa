// Channels side by side in memory: the kernels for channel-last layouts.
#pragma once

#include "ops/causal_conv1d/cuda/runs.cuh"

namespace krait::conv_detail {

// A warp walks one piece of a run, each lane with kVector channels; warps of a block take neighbouring pieces.
inline constexpr int kWarps = 4;

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector < 16 ? sizeof(T) * kVector : 16) Pack {
  T v[kVector];
};

// A tensor (B, D, L) with channels side by side.
struct Rows {
  void* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t token_stride = 0;

  Rows() = default;
  explicit Rows(const Tensor& t) {
    if (t) *this = Rows{t.raw(), t.stride(0), t.stride(2)};
  }
  Rows(void* d, std::int64_t row, std::int64_t token) : data(d), row_stride(row), token_stride(token) {}

  template <typename T>
  __device__ __forceinline__ T* at(std::int64_t row, std::int64_t channel) const {
    return static_cast<T*>(data) + row * row_stride + channel;
  }
};

// Weights as (K, channels), the bias behind them, of the channels of a block: read together, transposed.
template <int kTaps, int kChannels>
__device__ __forceinline__ void stage_filter(const Filter& filter, std::int64_t channel0, std::int64_t channels,
                                             float (&staged)[kTaps + 1][kChannels]) {
  for (int i = static_cast<int>(threadIdx.x); i < kTaps * kChannels; i += kWarps * 32) {
    const std::int64_t channel = channel0 + i / kTaps;
    staged[i % kTaps][i / kTaps] = channel < channels ? filter.weight.load(channel, i % kTaps) : 0.0F;
  }
  for (int c = static_cast<int>(threadIdx.x); c < kChannels; c += kWarps * 32)
    staged[kTaps][c] = channel0 + c < channels ? filter.bias_of(channel0 + c) : 0.0F;
  __syncthreads();
}

template <int kRows, int kChannels, int kVector>
__device__ __forceinline__ void read_staged(const float (&staged)[kRows][kChannels], int row, int lane,
                                            float (&to)[kVector]) {
#pragma unroll
  for (int v = 0; v < kVector; ++v) to[v] = staged[row][lane * kVector + v];
}

template <typename T, int kVector>
__device__ __forceinline__ void widen(const Pack<T, kVector>& from, float (&to)[kVector]) {
#pragma unroll
  for (int v = 0; v < kVector; ++v) to[v] = cuda::to_float(from.v[v]);
}

template <typename T, int kVector>
__device__ __forceinline__ Pack<T, kVector> narrow(const float (&from)[kVector]) {
  Pack<T, kVector> to;
#pragma unroll
  for (int v = 0; v < kVector; ++v) to.v[v] = cuda::from_float<T>(from[v]);
  return to;
}

}  // namespace krait::conv_detail
