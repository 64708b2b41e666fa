// How a warp of the forward walks the tokens of a tile in shared memory.
#pragma once

#include "ops/selective_scan/cuda/stage.cuh"

namespace krait::scan {

inline constexpr int kWarps = kWalkers / 32;

// gradients: the recurrence of the backward's gradient of the state, from the gradient of outputs (in place
// of u) and C (in place of B), for gradients_between.
enum class Pass { outputs, states, gradients };
template <Pass kPass>
inline constexpr bool kNoOutputs = kPass != Pass::outputs;

// Each warp has channels of its own: it makes dt and dt u of a tile, walks it, and turns sums over states
// into outputs. The block's warps share B and C alone.
// Sums over the lanes of a team are made where outputs are, from what lanes leave in shared memory (kApart),
// or, where a team has several channels, by shuffles as tokens are walked.
template <int kLanes, int kStates, int kPerTeam, int kResident_>
struct Shape : Teams<kLanes, kStates, kPerTeam> {
  using Base = Teams<kLanes, kStates, kPerTeam>;
  static constexpr int kResident = kResident_;  // blocks that a multiprocessor has registers for
  static constexpr bool kApart = kPerTeam == 1;
  static constexpr int kWarpChannels = 32 / kLanes * kPerTeam;
  static constexpr int kSteps = kLanes / kPerTeam;       // tokens whose sums are shuffled together
  static constexpr int kBody = kApart ? 8 : 4 * kSteps;  // tokens of a loop's body
  // dt and dt u of a channel and a token lie side by side, a cell. Rows begin in different banks.
  static constexpr int kRow = kWarpChannels + (kWarpChannels < 4 ? 0 : 2);
  static constexpr int kCells = 2 * kTile * kRow;  // floats of a warp
  static constexpr int kSums = kApart ? 32 * kTile : 0;
  // Where each part of shared memory starts, in floats.
  static constexpr int kFirstSums = kWarps * kCells;
  static constexpr int kFactors = kFirstSums + kWarps * kSums;
  static constexpr int kBias = kFactors + 2 * Factors<Base::kAll>::kFloats;
  static constexpr int kSkip = kBias + Base::kChannels;
  static constexpr int kFloats = kSkip + Base::kChannels;
};

// What the lanes of a warp have summed over their states, a tile of it: (token, lane). In each row, 16 bytes
// are exchanged so that those who read one place of several rows find different banks.
__device__ __forceinline__ int sum_at(int row, int lane) {
  return row * 32 + ((lane / 4) ^ row % 8) * 4 + lane % 4;
}

// The states of a thread.
template <typename S>
struct States {
  float A[S::kPerTeam][S::kStates];  // log2(e) A
  float h[S::kPerTeam][S::kStates];
  float steps[S::kPerTeam];  // the sum of dt
};

// One token of a channel.
template <Pass kPass>
__device__ __forceinline__ void step(float& h, float decay, float input, float factor) {
  h = kPass == Pass::gradients ? decay * fmaf(input, factor, h) : fmaf(decay, h, input * factor);
}

// The rows of a tile, from dt and dt u to sums over states. Rows behind the last token leave the state as it
// is: always a whole body.
template <typename S, Pass kPass>
__device__ __forceinline__ void walk_apart(const float2* cells, const float* factors, float* sums, int rows,
                                           States<S>& states) {
  constexpr int kStates = S::kStates;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float2* const own = cells + lane / S::kLanes;
  const float* const from = factors + lane % S::kLanes * kStates;
  struct Numbers {
    float2 cell;
    float B[kStates];
    float C[kStates];
  };
  const auto load = [&](int row, Numbers& to) {
    to.cell = own[row * S::kRow];
    load_shared(from + row * Factors<S::kAll>::kRow, to.B);
    if constexpr (!kNoOutputs<kPass>) load_shared(from + row * Factors<S::kAll>::kRow + S::kAll, to.C);
  };
  // Decays are computed a token ahead and what they need is loaded two ahead: a thread alone has to hide that
  // these take long.
  Numbers here;
  Numbers next;
  float decay[kStates];
  load(0, here);
  load(1, next);
#pragma unroll
  for (int k = 0; k < kStates; ++k) decay[k] = exp2_fast(here.cell.x * states.A[0][k]);
#pragma unroll 1
  for (int row = 0; row < rows; row += S::kBody) {
#pragma unroll
    for (int s = 0; s < S::kBody; ++s) {
      Numbers later;
      // Behind the last row the first ones again: nobody uses them.
      load(s + 2 < S::kBody ? row + s + 2 : (row + s + 2) % kTile, later);
      float decay_next[kStates];
#pragma unroll
      for (int k = 0; k < kStates; ++k) decay_next[k] = exp2_fast(next.cell.x * states.A[0][k]);
      float sum = 0.0F;
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        step<kPass>(states.h[0][k], decay[k], here.cell.y, here.B[k]);
        if constexpr (!kNoOutputs<kPass>)
          sum = k == 0 ? here.C[k] * states.h[0][k] : fmaf(here.C[k], states.h[0][k], sum);
        decay[k] = decay_next[k];
      }
      if constexpr (kNoOutputs<kPass>)
        states.steps[0] += here.cell.x;
      else
        sums[row * 32 + sum_at(s, lane)] = sum;  // `row` is a multiple of 8
      here = next;
      next = later;
    }
  }
}

template <typename S, Pass kPass>
__device__ __forceinline__ void walk_together(float2* cells, const float* factors, int rows,
                                              States<S>& states) {
  constexpr int kStates = S::kStates;
  constexpr int kPerTeam = S::kPerTeam;
  constexpr int kSteps = S::kSteps;
  const int lane = static_cast<int>(threadIdx.x) % S::kLanes;
  float2* const team = cells + static_cast<int>(threadIdx.x) % 32 / S::kLanes * kPerTeam;
  const float2* own[kPerTeam];
#pragma unroll
  for (int c = 0; c < kPerTeam; ++c) own[c] = team + (c ^ (lane % kPerTeam));
  const float* const from = factors + lane * kStates;
  // dt, dt u, B and C of kSteps tokens, on their way while the tokens before them are walked.
  struct Numbers {
    float2 cell[kSteps][kPerTeam];
    float B[kSteps][kStates];
    float C[kSteps][kStates];
  };
  const auto load = [&](int row, Numbers& to) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int c = 0; c < kPerTeam; ++c) to.cell[s][c] = own[c][(row + s) * S::kRow];
      load_shared(from + (row + s) * Factors<S::kAll>::kRow, to.B[s]);
      if constexpr (!kNoOutputs<kPass>)
        load_shared(from + (row + s) * Factors<S::kAll>::kRow + S::kAll, to.C[s]);
    }
  };
  Numbers next;
  load(0, next);
#pragma unroll 1
  for (int row = 0; row < rows; row += S::kBody) {
#pragma unroll
    for (int first = 0; first < S::kBody; first += kSteps) {
      float y[kSteps][kPerTeam];
      const Numbers here = next;
      // Behind the last row the first ones again: nobody uses them.
      load(first + kSteps < S::kBody ? row + first + kSteps : (row + first + kSteps) % kTile, next);
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int c = 0; c < kPerTeam; ++c) {
          float sum = 0.0F;
#pragma unroll
          for (int k = 0; k < kStates; ++k) {
            float& h = states.h[c][k];
            step<kPass>(h, exp2_fast(here.cell[s][c].x * states.A[c][k]), here.cell[s][c].y, here.B[s][k]);
            if constexpr (!kNoOutputs<kPass>) sum = fmaf(here.C[s][k], h, sum);
          }
          if constexpr (kNoOutputs<kPass>)
            states.steps[c] += here.cell[s][c].x;
          else
            y[s][c] = sum;
        }
      if constexpr (!kNoOutputs<kPass>) {
        // Nobody but these lanes reads dt of these rows, and all of them have.
        __syncwarp();
        sum_over_team<S>(
            y, [&](int s, float sum) { team[(row + first + s) * S::kRow + lane % kPerTeam].x = sum; });
      }
    }
  }
}

}  // namespace krait::scan
