// What the warpgroups of warpgroup_backward.cu leave for each head, how it becomes gradients, and sums over
// the heads of a part.
#pragma once

#include <cstdint>

#include "ops/ssd/cuda/backward.cuh"
#include "ops/ssd/cuda/panels.cuh"

namespace krait::ssd_detail {

inline constexpr int kGroup = 128;  // threads of a warpgroup
inline constexpr int kWarps = kGroup / 32;

// Sums of one value for each token. What several warps have a part of is kept apart by them, and added in
// order.
enum Sum {
  kRows,                    // of T over j: by the strips of rows of the pairs, which are j
  kStart = kRows + kWarps,  // dC' . C
  kColumns,                 // of T over i
  kEnds,                    // x . v'
  kSteps,                   // x . v
  kSums,
};

// Values of a head.
struct alignas(16) Values {
  Steps steps;
  float sums[kSums][kTokens];
  float through[kWarps];  // <G, S>
  float skip[kWarps];     // <dy, x>
  float D;
};

#ifdef KRAIT_WGMMA

// The sum over the four lanes that share a row of a fragment.
__device__ __forceinline__ float sum_of_row(float v) {
  v += __shfl_xor_sync(0xffffffffU, v, 1);
  return v + __shfl_xor_sync(0xffffffffU, v, 2);
}

// Sums over the eight lanes that share columns of fragments: of v[n], n of 8. The lane is left with those of
// fragment n = 4 (bit 4 of the lane) + 2 (bit 3) + (bit 2).
__device__ __forceinline__ float2 sum_of_columns(float (&v)[8][2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & (half * 4)) != 0;
#pragma unroll
    for (int n = 0; n < half; ++n) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float given = upper ? v[n][k] : v[n + half][k];
        const float kept = upper ? v[n + half][k] : v[n][k];
        v[n][k] = kept + __shfl_xor_sync(0xffffffffU, given, half * 4);
      }
    }
  }
  return make_float2(v[0][0], v[0][1]);
}

// Of a head whose sums are there, by a warp: the gradient by dt, and what the chunk has of those by A,
// dt_bias and D.
__device__ __forceinline__ void finish_head(const Inputs& in, const Segments& chunks, const Segment& chunk,
                                            std::int64_t s, std::int64_t head, const Values& values,
                                            const Gradients& to, const Sums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int count = static_cast<int>(chunk.count);
  const float rate = rate_of(in, head);
  // Tokens `lane` and `lane` + 32.
  float from_end[2];    // to be summed over i >= t
  float from_start[2];  // over j < t
  float own[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + i * 32;
    from_end[i] = (values.sums[kRows][t] + values.sums[kRows + 1][t]) +
                  (values.sums[kRows + 2][t] + values.sums[kRows + 3][t]) - values.sums[kColumns][t];
    from_end[i] += values.sums[kStart][t];
    own[i] = from_start[i] = values.steps.d[t] * values.sums[kEnds][t];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float after = __shfl_down_sync(0xffffffffU, from_end[i], distance);
      if (lane + distance < 32) from_end[i] += after;
      const float before = __shfl_up_sync(0xffffffffU, from_start[i], distance);
      if (lane >= distance) from_start[i] += before;
    }
  }
  from_end[0] += __shfl_sync(0xffffffffU, from_end[1], 0);
  from_start[1] += __shfl_sync(0xffffffffU, from_start[0], 31);
  float state = 0.0F;
  float dD = 0.0F;
  for (int w = 0; w < kWarps; ++w) {
    state += values.through[w];
    dD += values.skip[w];
  }
  state *= exp2_fast(values.steps.a[kTokens - 1]);

  float dA = 0.0F;
  float ddt_bias = 0.0F;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + i * 32;
    if (t >= count) continue;
    const float exponent = from_end[i] + (from_start[i] - own[i]) + state;
    dA = fmaf(values.steps.d[t], exponent, dA);
    const float dd = fmaf(rate, exponent, values.sums[kSteps][t]) * values.steps.slope[t];
    ddt_bias += dd;
    if (to.ddt) to.ddt.store(dd, chunk.row, chunks.position(chunk, t), head);
  }
  dA = cuda::warp_sum(dA);
  ddt_bias = cuda::warp_sum(ddt_bias);
  if (lane == 0) {
    if (sums.dA != nullptr) sums.dA[s * in.heads + head] = dA;
    if (sums.ddt_bias != nullptr) sums.ddt_bias[s * in.heads + head] = ddt_bias;
    if (sums.dD != nullptr) sums.dD[s * in.heads + head] = dD;
  }
}

// What a block works on.
struct Work {
  std::int64_t s, group, part;              // the chunk, the group, and which of its blocks of heads
  int first_head, last_head, tiles, items;  // heads are far fewer than 2^31, and 32 bits are divided faster
};

// Rows of f32 sums to their part of the sums over heads.
template <int kN>
__device__ __forceinline__ void store_part(float* sums, const Inputs& in, const Segments& chunks,
                                           const Segment& chunk, const Work& work, std::int64_t stride,
                                           int row, const float (&d)[kN / 8][4]) {
  if (sums == nullptr) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const int t = row + k * 4;
    if (t >= chunk.count) continue;
    const std::int64_t token = chunk.row * chunks.length + chunks.position(chunk, t);
    float* to = sums + work.part * stride + (token * in.groups + work.group) * in.d_state;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      if (column < in.d_state) *reinterpret_cast<float2*>(to + column) = make_float2(d[n][k], d[n][k + 1]);
    }
  }
}

#endif

}  // namespace krait::ssd_detail
