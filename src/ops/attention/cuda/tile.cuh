// Pieces of the kernels of attention for any width and any strides: tiles of 64 x 64 held by 16 x 16 threads,
// 4 x 4 elements each, and products of such tiles whose operands pass through shared memory 16 deep.
#pragma once

#include "core/cuda/elements.cuh"
#include "ops/attention/kernels.h"

namespace krait::attention_kernels::gpu {

inline constexpr int kTile = 64;
inline constexpr int kDepth = 16;
inline constexpr int kTileThreads = 256;
inline constexpr float kLog2E = 1.4426950408889634F;
inline constexpr float kLn2 = 0.6931471805599453F;

// Element (line, depth) of an operand while it is in shared memory.
struct Stage {
  float at[kDepth][kTile + 1];
};
// A tile of weights or of their gradients, by row and key.
struct Weights {
  float at[kTile][kTile + 1];
};

// The rows of a tile: where they begin, and how many keys they see (0 beyond the last row).
struct Rows {
  std::int64_t q[kTile];    // in q and dq
  std::int64_t out[kTile];  // in out
  std::int64_t dout[kTile];
  std::int64_t visible[kTile];
};

__device__ __forceinline__ std::int64_t offset_of_row(const Operand& o, std::int64_t query,
                                                      std::int64_t head) {
  return query * o.position_stride + head * o.head_stride;
}

// By all threads; the caller has a barrier before and behind.
__device__ __forceinline__ void place_rows(const Problem& p, const Operand& dout, std::int64_t head_kv,
                                           std::int64_t first, Rows& rows) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kTile) return;
  const bool inside = first + i < p.queries * p.group;
  const std::int64_t row = inside ? first + i : 0;
  const std::int64_t query = row / p.group;
  const std::int64_t head = head_kv * p.group + row % p.group;
  rows.q[i] = offset_of_row(p.q, query, head);
  rows.out[i] = offset_of_row(p.out, query, head);
  rows.dout[i] = offset_of_row(dout, query, head);
  rows.visible[i] = !inside ? 0 : p.causal ? p.keys - p.queries + query + 1 : p.keys;
}

// to(line, depth) = load(line, depth) for a whole stage. Neighbouring threads have neighbouring depths where
// kAlongDepth, else neighbouring lines.
template <bool kAlongDepth, typename Load>
__device__ __forceinline__ void fill_stage(Stage& to, const Load& load) {
#pragma unroll
  for (int n = 0; n < kTile * kDepth / kTileThreads; ++n) {
    const int i = static_cast<int>(threadIdx.x) + n * kTileThreads;
    const int line = kAlongDepth ? i / kDepth : i % kTile;
    const int depth = kAlongDepth ? i % kDepth : i / kTile;
    to.at[depth][line] = load(line, depth);
  }
}

// sum[i][j] += a(ty + 16 i, depth) b(tx + 16 j, depth) over one stage.
template <typename A>
__device__ __forceinline__ void multiply_stage(const A& a, const Stage& b, float (&sum)[4][4]) {
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const int ty = static_cast<int>(threadIdx.x) / 16;
#pragma unroll
  for (int depth = 0; depth < kDepth; ++depth) {
    float x[4];
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = a(ty + 16 * i, depth);
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = b.at[depth][tx + 16 * j];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
  }
}

// sum (rows, keys) of the dot products over `width` channels of rows of `a`, which begin at `begins`, with
// keys `key` .. of `b` of one head. Barriers before and behind.
__device__ __forceinline__ void multiply_rows_by_keys(const Operand& a, const std::int64_t* begins,
                                                      const Operand& b, std::int64_t head_kv,
                                                      std::int64_t key, std::int64_t keys, std::int64_t width,
                                                      Stage& a_stage, Stage& b_stage, float (&sum)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0.0F;
  for (std::int64_t channel = 0; channel < width; channel += kDepth) {
    __syncthreads();
    fill_stage<true>(a_stage, [&](int line, int depth) {
      const std::int64_t c = channel + depth;
      return c < width ? cuda::load_float(a.data, a.dtype, begins[line] + c * a.channel_stride) : 0.0F;
    });
    fill_stage<true>(b_stage, [&](int line, int depth) {
      const std::int64_t c = channel + depth;
      if (c >= width || key + line >= keys) return 0.0F;
      return cuda::load_float(
          b.data, b.dtype, (key + line) * b.position_stride + head_kv * b.head_stride + c * b.channel_stride);
    });
    __syncthreads();
    multiply_stage([&](int line, int depth) { return a_stage.at[depth][line]; }, b_stage, sum);
  }
  __syncthreads();
}

// sum (rows, channels) += weights (rows, keys) of channels `first` .. of keys `key` .. of `b`. Barriers
// before and behind.
__device__ __forceinline__ void add_weighted_keys(const Weights& weights, const Operand& b,
                                                  std::int64_t head_kv, std::int64_t key, std::int64_t keys,
                                                  std::int64_t first, std::int64_t width, Stage& stage,
                                                  float (&sum)[4][4]) {
  for (int part = 0; part < kTile && key + part < keys; part += kDepth) {
    __syncthreads();
    fill_stage<false>(stage, [&](int line, int depth) {
      const std::int64_t k = key + part + depth;
      const std::int64_t c = first + line;
      if (k >= keys || c >= width) return 0.0F;
      return cuda::load_float(b.data, b.dtype,
                              k * b.position_stride + head_kv * b.head_stride + c * b.channel_stride);
    });
    __syncthreads();
    multiply_stage([&](int line, int depth) { return weights.at[line][part + depth]; }, stage, sum);
  }
  __syncthreads();
}

// sum (keys, channels) += weights (rows, keys) transposed, times channels `first` .. of rows of `b`. Rows
// that are not there have begins of the first row and weights of 0. Barriers before and behind.
__device__ __forceinline__ void add_weighted_rows(const Weights& weights, const Operand& b,
                                                  const std::int64_t* begins, std::int64_t first,
                                                  std::int64_t width, Stage& stage, float (&sum)[4][4]) {
  for (int part = 0; part < kTile; part += kDepth) {
    __syncthreads();
    fill_stage<false>(stage, [&](int line, int depth) {
      const std::int64_t c = first + line;
      return c < width ? cuda::load_float(b.data, b.dtype, begins[part + depth] + c * b.channel_stride)
                       : 0.0F;
    });
    __syncthreads();
    multiply_stage([&](int line, int depth) { return weights.at[part + depth][line]; }, stage, sum);
  }
  __syncthreads();
}

}  // namespace krait::attention_kernels::gpu
