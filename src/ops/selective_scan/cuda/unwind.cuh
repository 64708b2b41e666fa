// What the backward does with a tile in shared memory: forward from its checkpoint, and back.
#pragma once

#include "ops/selective_scan/cuda/stage.cuh"

namespace krait::scan {

inline constexpr float kLn2 = 0.6931471805599453F;

// kSub tokens are unwound at a time. Sums over channels of kFlush tokens of each warp wait in shared memory.
template <int kLanes, int kStates, int kPerTeam, int kSub_>
struct UnwindShape : Teams<kLanes, kStates, kPerTeam> {
  using Base = Teams<kLanes, kStates, kPerTeam>;
  static constexpr int kSub = kSub_;
  static constexpr int kSubs = kTile / kSub;
  static constexpr int kFlush = Base::kAll <= 16 ? kTile : Base::kAll <= 64 ? 512 / Base::kAll : kSub;
  static_assert(kFlush % kSub == 0 && kFlush <= kTile);

  // Where each part of shared memory starts, in floats.
  static constexpr int kFactors = 4 * kTile * Base::kChannels;
  static constexpr int kStarts = kFactors + Factors<Base::kAll>::kFloats;
  static constexpr int kPartials = kStarts + kSubs * kStates * kPerTeam * kWalkers;
  static constexpr int kPartial = kFlush * 2 * Base::kAll;  // of a warp: (token, B or C, state)
  static constexpr int kTotals = kPartials + kWalkers / 32 * kPartial;
  static constexpr int kTotal = 20;  // of a thread: 16 in use
  static constexpr int kBias = kTotals + kTotal * kMovers;
  static constexpr int kSkip = kBias + Base::kChannels;
  static constexpr int kFloats = kSkip + Base::kChannels;
};

// A cell for each (token, channel): dt, dt u, dy, nothing; then dt and the sums over states of y, of the
// gradient of dt u and of that of dt. Threads write 8 channels each, one after the other: their order keeps
// them in different banks.
template <typename S>
__device__ __forceinline__ int cell_at(int row, int channel) {
  return row * S::kChannels + (channel ^ (channel / 8 & 7));
}

// The states of a thread before the tokens of a sub, in shared memory: 16 bytes of each thread side by side.
template <typename S>
struct Starts {
  static constexpr int kCount = S::kStates * S::kPerTeam;
  static constexpr int kTogether = kCount < 4 ? kCount : 4;
  float* shared;

  __device__ __forceinline__ Packed<float, kTogether>* at(int sub, int i) const {
    return reinterpret_cast<Packed<float, kTogether>*>(shared) +
           (sub * (kCount / kTogether) + i / kTogether) * kWalkers + threadIdx.x;
  }
  __device__ __forceinline__ void store(int sub, const float (&h)[S::kPerTeam][S::kStates]) const {
#pragma unroll
    for (int i = 0; i < kCount; i += kTogether) {
      Packed<float, kTogether> packed;
#pragma unroll
      for (int j = 0; j < kTogether; ++j) packed.v[j] = h[(i + j) / S::kStates][(i + j) % S::kStates];
      *at(sub, i) = packed;
    }
  }
  __device__ __forceinline__ void load(int sub, float (&h)[S::kPerTeam][S::kStates]) const {
#pragma unroll
    for (int i = 0; i < kCount; i += kTogether) {
      const Packed<float, kTogether> packed = *at(sub, i);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) h[(i + j) / S::kStates][(i + j) % S::kStates] = packed.v[j];
    }
  }
};

// What a thread carries from tile to tile.
template <typename S>
struct Carried {
  float A[S::kPerTeam][S::kStates];  // log2(e) A
  float g[S::kPerTeam][S::kStates];  // the gradient of the state
  float dA[S::kPerTeam][S::kStates];
};

// From the state h before a tile on: the states before each sub but the first.
template <typename S>
__device__ __forceinline__ void walk_tile(float* shared, int subs, const float (&A)[S::kPerTeam][S::kStates],
                                          float (&h)[S::kPerTeam][S::kStates]) {
  const int lane = static_cast<int>(threadIdx.x) % S::kLanes;
  const int team = static_cast<int>(threadIdx.x) / S::kLanes;
  const auto* const cells = reinterpret_cast<const float4*>(shared);
  const float* const factors = shared + S::kFactors + lane * S::kStates;
  const Starts<S> starts = {shared + S::kStarts};
  starts.store(0, h);
  for (int sub = 0; sub + 1 < subs; ++sub) {
#pragma unroll
    for (int s = 0; s < S::kSub; ++s) {
      const int row = sub * S::kSub + s;
      float B[S::kStates];
      load_shared(factors + row * Factors<S::kAll>::kRow, B);
#pragma unroll
      for (int c = 0; c < S::kPerTeam; ++c) {
        const auto step = *reinterpret_cast<const float2*>(
            &cells[cell_at<S>(row, team * S::kPerTeam + (c ^ (lane % S::kPerTeam)))]);
#pragma unroll
        for (int k = 0; k < S::kStates; ++k)
          h[c][k] = fmaf(exp2_fast(step.x * A[c][k]), h[c][k], step.y * B[k]);
      }
    }
    starts.store(sub + 1, h);
  }
}

// The tokens of a sub from the last to the first: decays and states into registers, then back.
template <typename S>
__device__ __forceinline__ void unwind_sub(float* shared, int sub, Carried<S>& carried) {
  constexpr int kSub = S::kSub;
  constexpr int kStates = S::kStates;
  constexpr int kPerTeam = S::kPerTeam;
  const int lane = static_cast<int>(threadIdx.x) % S::kLanes;
  const int team = static_cast<int>(threadIdx.x) / S::kLanes;
  auto* const cells = reinterpret_cast<float4*>(shared);
  const float* const factors = shared + S::kFactors + lane * kStates;

  float h[kPerTeam][kStates];
  Starts<S>{shared + S::kStarts}.load(sub, h);
  float decay[kSub][kPerTeam][kStates];
  float before[kSub][kPerTeam][kStates];
  float4 cell[kSub][kPerTeam];
  float B[kSub][kStates];
#pragma unroll
  for (int s = 0; s < kSub; ++s) {
    const int row = sub * kSub + s;
    load_shared(factors + row * Factors<S::kAll>::kRow, B[s]);
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c) {
      cell[s][c] = cells[cell_at<S>(row, team * kPerTeam + (c ^ (lane % kPerTeam)))];
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        decay[s][c][k] = exp2_fast(cell[s][c].x * carried.A[c][k]);
        before[s][c][k] = h[c][k];
        h[c][k] = fmaf(decay[s][c][k], h[c][k], cell[s][c].y * B[s][k]);
      }
    }
  }
  float y[kSub][kPerTeam];
  float dinput[kSub][kPerTeam];
  float ddt[kSub][kPerTeam];
  float* const partial = shared + S::kPartials + threadIdx.x / 32 * S::kPartial + lane * kStates;
#pragma unroll
  for (int s = kSub - 1; s >= 0; --s) {
    const int row = sub * kSub + s;
    float C[kStates];
    load_shared(factors + row * Factors<S::kAll>::kRow + S::kAll, C);
    float to_factors[2 * kStates] = {};  // to B and to C
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c) {
      y[s][c] = dinput[s][c] = ddt[s][c] = 0.0F;
      const float4 at = cell[s][c];
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        float& g = carried.g[c][k];
        y[s][c] = fmaf(C[k], h[c][k], y[s][c]);
        to_factors[kStates + k] = fmaf(at.z, h[c][k], to_factors[kStates + k]);
        g = fmaf(at.z, C[k], g);
        to_factors[k] = fmaf(g, at.y, to_factors[k]);
        dinput[s][c] = fmaf(g, B[s][k], dinput[s][c]);
        g *= decay[s][c][k];
        // Through exp(dt A) h: the gradient of the exponent dt A.
        const float dexponent = g * before[s][c][k];
        ddt[s][c] = fmaf(dexponent, carried.A[c][k], ddt[s][c]);
        carried.dA[c][k] = fmaf(dexponent, at.x, carried.dA[c][k]);
        h[c][k] = before[s][c][k];
      }
    }
    sum_over_teams<S>(to_factors, [&](int i, float sum) {
      const int at = i < kStates ? i : S::kAll + i - kStates;
      partial[row % S::kFlush * 2 * S::kAll + at] = sum;
    });
  }
  // These lanes alone read the cells of their channels, and they have.
  __syncwarp();
  const auto at = [&](int s) {
    return &cells[cell_at<S>(sub * kSub + s, team * kPerTeam + lane % kPerTeam)];
  };
  sum_over_team<S>(y, [&](int s, float sum) { at(s)->y = sum; });
  sum_over_team<S>(dinput, [&](int s, float sum) { at(s)->z = sum; });
  sum_over_team<S>(ddt, [&](int s, float sum) { at(s)->w = kLn2 * sum; });
}

}  // namespace krait::scan
