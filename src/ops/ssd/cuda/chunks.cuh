// What the kernels on tensor cores share: chunks of kChunk tokens, their tiles and steps.
#pragma once

#include <cstdint>

#include "ops/ssd/cuda/inputs.cuh"
#include "ops/ssd/cuda/mma.cuh"
#include "ops/ssd/kernels.h"

namespace krait::ssd_detail {

inline constexpr int kTokens = static_cast<int>(kChunk);
inline constexpr int kChannels = 64;  // of a head, that a block works on together
// A factor below is 0 in f32. Sums of exponents stay small enough that differences keep their digits.
inline constexpr float kLeastExponent = -110.0F;

// One value for each token of a chunk.
struct Steps {
  float a[kTokens];      // the sum of the exponents d A from the chunk's first token on, times log2(e)
  float d[kTokens];      // 0 beyond the end
  float slope[kTokens];  // the derivative of d by dt
  float start[kTokens];  // exp(a): what the token has of the state before the chunk
  float left[kTokens];   // d exp(a_last - a): what the state after the chunk has of the token
};

// Rows of tokens [begin, begin + kTokens) of the segment, `columns` of them (the tile has kColumns); tokens
// beyond its end are 0.
template <int kColumns, int kThreads, typename T>
__device__ __forceinline__ void load_tile(unsigned tile, const T* from, std::int64_t token_stride,
                                          std::int64_t columns, const Segments& segments,
                                          const Segment& segment, std::int64_t begin) {
  constexpr int kVectors = kColumns / 8;
  constexpr int kRows = kThreads / kVectors;  // at a time
  static_assert(kRows % 8 == 0, "the vectors of a thread lie alike in their rows");
  const int first = static_cast<int>(threadIdx.x) / kVectors;
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const bool inside = vector * 8 < columns;
  const unsigned to = tile + tile_offset<kColumns>(first, vector);
  from += vector * 8;
  if (segment.listed < 0) {
    const T* source = from + (segment.start + (begin + first) * segment.step) * token_stride;
    const std::int64_t jump = kRows * segment.step * token_stride;
#pragma unroll
    for (int row = 0; row < kTokens; row += kRows) {
      copy_async(to + static_cast<unsigned>(row * kColumns * 2), source,
                 inside && begin + first + row < segment.count);
      source += jump;
    }
  } else {
#pragma unroll 1
    for (int row = 0; row < kTokens; row += kRows) {
      const std::int64_t i = begin + first + row;
      const bool there = inside && i < segment.count;
      copy_async(to + static_cast<unsigned>(row * kColumns * 2),
                 there ? from + segments.positions[segment.listed + i] * token_stride : from, there);
    }
  }
}

// kTokens rows of `columns` elements that follow one another; the tile has kColumns.
template <int kColumns, int kThreads, typename T>
__device__ __forceinline__ void load_rows(unsigned tile, const T* from, std::int64_t columns) {
  constexpr int kVectors = kColumns / 8;
  constexpr int kRows = kThreads / kVectors;  // at a time
  static_assert(kRows % 8 == 0, "the vectors of a thread lie alike in their rows");
  const int first = static_cast<int>(threadIdx.x) / kVectors;
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const bool inside = vector * 8 < columns;
  const unsigned to = tile + tile_offset<kColumns>(first, vector);
  from += inside ? first * columns + vector * 8 : 0;
#pragma unroll
  for (int row = 0; row < kTokens; row += kRows) {
    copy_async(to + static_cast<unsigned>(row * kColumns * 2), from, inside);
    from += kRows * columns;
  }
}

// An element as it lies in memory, and its value: a load that is not waited for where it is begun.
__device__ __forceinline__ unsigned load_bits(const AnyView<3>& view, std::int64_t at) {
  return view.dtype == DType::f32 ? static_cast<const unsigned*>(view.data)[at]
                                  : static_cast<const unsigned short*>(view.data)[at];
}
__device__ __forceinline__ float value_of(unsigned bits, DType dtype) {
  if (dtype == DType::f32) return __uint_as_float(bits);
  if (dtype == DType::bf16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// The dt of the chunk's tokens `lane` and `lane` + 32.
__device__ __forceinline__ void load_dt(const Inputs& in, const Segments& segments, const Segment& segment,
                                        std::int64_t head, std::int64_t begin, int lane, float (&dt)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t t = begin + lane + i * 32;
    if (t < segment.count) dt[i] = in.dt.load(segment.row, segments.position(segment, t), head);
  }
}

// Two tokens for each lane of a warp. kShort: in loops, where a kernel's code is long.
template <bool kShort = false>
__device__ __forceinline__ void compute_steps(const Inputs& in, const float (&dt)[2], float bias, float rate,
                                              std::int64_t count, int lane, Steps& steps) {
  float d[2] = {};
  float a[2] = {};
#pragma unroll(kShort ? 1 : 2)
  for (int i = 0; i < 2; ++i) {
    const bool inside = lane + i * 32 < count;
    const Step step = step_from(in, i == 0 ? dt[0] : dt[1], bias, rate);
    steps.slope[lane + i * 32] = step.slope;
    const float exponent = step.exponent < kLeastExponent ? kLeastExponent : step.exponent;
    d[0] = d[1];
    a[0] = a[1];
    d[1] = inside ? step.d : 0.0F;
    a[1] = inside ? exponent * kLog2E : 0.0F;
  }
#pragma unroll(kShort ? 1 : 5)
  for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float other = __shfl_up_sync(0xffffffffU, a[i], distance);
      if (lane >= distance) a[i] += other;
    }
  }
  a[1] += __shfl_sync(0xffffffffU, a[0], 31);
  const float last = __shfl_sync(0xffffffffU, a[1], 31);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    steps.a[lane + i * 32] = a[i];
    steps.d[lane + i * 32] = d[i];
    steps.start[lane + i * 32] = exp2_fast(a[i]);
    steps.left[lane + i * 32] = d[i] * exp2_fast(last - a[i]);
  }
}

// A state in the sums of a block of four warps: warp w has channels 16 w to 16 w + 15, all kN columns. Goes
// through `tile`, kChannels x kN floats of shared memory that nothing else uses meanwhile; f(channel, column,
// value) for all elements with column < d_state.
template <int kN, typename F>
__device__ __forceinline__ void read_state(float* tile, std::int64_t d_state, float (&S)[kN / 8][4],
                                           const F& f) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
#pragma unroll 4
  for (int i = thread; i < kChannels * kN; i += 128) {
    float value = 0.0F;
    if (i % kN < d_state) f(i / kN, i % kN, value);
    tile[i] = value;
  }
  __syncthreads();
  const float* own = tile + (thread / 32 * 16 + thread % 32 / 4) * kN + thread % 4 * 2;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const float2 v = *reinterpret_cast<const float2*>(own + k * 4 * kN + n * 8);
      S[n][k] = v.x;
      S[n][k + 1] = v.y;
    }
  }
  __syncthreads();
}
template <int kN, typename F>
__device__ __forceinline__ void write_state(float* tile, std::int64_t d_state, const float (&S)[kN / 8][4],
                                            const F& f) {
  const int thread = static_cast<int>(threadIdx.x);
  float* own = tile + (thread / 32 * 16 + thread % 32 / 4) * kN + thread % 4 * 2;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
    for (int k = 0; k < 4; k += 2)
      *reinterpret_cast<float2*>(own + k * 4 * kN + n * 8) = make_float2(S[n][k], S[n][k + 1]);
  }
  __syncthreads();
#pragma unroll 4
  for (int i = thread; i < kChannels * kN; i += 128)
    if (i % kN < d_state) f(i / kN, i % kN, tile[i]);
}

}  // namespace krait::ssd_detail
