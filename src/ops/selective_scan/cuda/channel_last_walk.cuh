// How the warps of the scan's forward for channels side by side walk the tokens that its movers prepare.
#pragma once

#include <cstdint>

#include "core/cuda/meeting.cuh"
#include "ops/selective_scan/cuda/channel_last.cuh"

namespace krait::scan::channel_last {

// A group meets behind each body, and all of them one body before a tile of B and C ends, of which the next
// one is there then, and nobody reads the one before any more.
template <typename S>
__device__ __forceinline__ void meet_behind(int body, int group) {
  if (S::kGroups == 1 || (body + 2) % S::kBodies == 0)
    cuda::meet<kThreads>();
  else
    cuda::meet<S::kGroupThreads>(2 + group);
}

// Sums of two tokens over a team, whose lanes stand at bits 1 and 2 of the warp's: y[.][c] is of channel
// c ^ lane % kPerTeam, so that what a lane needs of its partner stands at the same place there.
template <typename S>
__device__ __forceinline__ void sum_over_team(float (&y)[2][S::kPerTeam], int lane, char* to) {
  constexpr unsigned kAll = 0xffffffffU;
  if constexpr (S::kPerTeam == 4) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      y[s][0] += __shfl_xor_sync(kAll, y[s][2], 4);
      y[s][1] += __shfl_xor_sync(kAll, y[s][3], 4);
      y[s][0] += __shfl_xor_sync(kAll, y[s][1], 2);
    }
    *reinterpret_cast<float2*>(to) = make_float2(y[0][0], y[1][0]);
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s) y[s][0] += __shfl_xor_sync(kAll, y[s][1], 2);
    const bool upper = lane >= 2;  // has the second token
    const float sent = upper ? y[0][0] : y[1][0];
    *reinterpret_cast<float*>(to) = (upper ? y[1][0] : y[0][0]) + __shfl_xor_sync(kAll, sent, 4);
  }
}

// What a thread of the walking half holds of a piece: kStates states of kPerTeam channels.
template <typename S>
class Walker {
 public:
  // Neighbours are of different teams and read the same of B and C: 8 or 16 bytes a lane take fewer passes of
  // shared memory where neighbours have one address.
  __device__ Walker(const Operands& o, const Item<S>& item, char* shared, int thread)
      : warp_(thread / 32),
        lane_(thread / 2 % S::kLanes),
        team_(thread % 2 + thread % 32 / (2 * S::kLanes) * 2),
        factors_(shared + S::kFactors + (S::kTwined ? 2 : 1) * lane_ * kStates * sizeof(float)),
        sums_(shared + S::kSums + warp_ * S::kSumWarp +
              (kPerTeam == 4   ? 8 * (4 * team_ + lane_)
               : kPerTeam == 2 ? 8 * (2 * team_ + lane_ % 2) + lane_ / 2 * 4
                               : team_ * S::kSumTeam + 4 * lane_)) {
    const Inputs<float>& in = o.in;
    each_state(o, item, [&](std::int64_t d, int n, int c, int k) {
      A_[c][k] = kLog2E * in.A.get(d, n);
      h_[c][k] = item.piece.part > 0 && o.carried != nullptr
                     ? o.carried[(item.piece_index * static_cast<int>(in.d_state) + n) * in.channels + d]
                     : in.state_before(item.piece, d, n);
    });
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c) cells_[c] = shared + S::kCells + warp_ * S::kCellWarp + 16 * place(c);
  }

  template <bool kCheckpoints>
  __device__ __forceinline__ void walk(const Operands& o, const Item<S>& item, int bodies) {
    // The state behind a body, where it is a checkpoint.
    const auto keep = [&](int body) {
      if (!kCheckpoints || (body + 1) % S::kBodies != 0) return;
      const std::int64_t tokens = std::int64_t{body + 1} * S::kBody;
      if (!item.piece.has_checkpoint_after(tokens)) return;
      const std::int64_t at = item.piece.checkpoint + tokens / kCheckpointSteps - 1;
      each_state(o, item, [&](std::int64_t d, int n, int c, int k) {
        o.checkpoints[(at * o.in.d_state + n) * o.in.channels + d] = h_[c][k];
      });
    };
    cuda::meet<kThreads>();  // the first bodies are there
    if constexpr (S::kApart)
      walk_apart(bodies, keep);
    else
      walk_together(bodies, keep);
    each_state(o, item, [&](std::int64_t d, int n, int c, int k) {
      if (o.last_state && item.piece.last) o.last_state.set(h_[c][k], item.piece.sequence, d, n);
    });
  }

 private:
  static constexpr int kPerTeam = S::kPerTeam;
  static constexpr int kStates = S::kStates;
  static constexpr int kRow = S::BAndC::kRow;

  // Of channel c of this thread, in its warp.
  __device__ __forceinline__ int place(int c) const { return team_ * kPerTeam + (c ^ (lane_ % kPerTeam)); }

  // f(channel, state, c, k) for those of this thread that exist.
  template <typename F>
  __device__ __forceinline__ void each_state(const Operands& o, const Item<S>& item, F&& f) const {
    const int d_state = static_cast<int>(o.in.d_state);
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c) {
      const int channel = warp_ * S::kWarpChannels + S::channel_at(place(c));
#pragma unroll
      for (int k = 0; k < kStates; ++k)
        if (const int n = lane_ * kStates + k; channel < item.channels && n < d_state)
          f(item.first + channel, n, c, k);
    }
  }

  // dt and dt u of two tokens of a channel.
  __device__ __forceinline__ float4 load_cell(int c, int slot, int pair) const {
    return *reinterpret_cast<const float4*>(cells_[c] + slot + pair * S::kCellPair);
  }
  __device__ __forceinline__ void load_factors(int rows, int token, float (&B)[kStates],
                                               float (&C)[kStates]) const {
    const float* const row = reinterpret_cast<const float*>(factors_ + rows) + token * kRow;
    if constexpr (S::kTwined) {
      const auto both = *reinterpret_cast<const float4*>(row);
      B[0] = both.x;
      B[1] = both.y;
      C[0] = both.z;
      C[1] = both.w;
    } else {
      load_shared(row, B);
      load_shared(row + S::kAll, C);
    }
  }

  __device__ __forceinline__ static int cell_slot(int body) {
    return body * S::kCellSlot & (S::kCellRing - 1);
  }
  __device__ __forceinline__ static int rows_behind(int rows) {
    return rows + S::kFactorBody == S::kFactorRing ? 0 : rows + S::kFactorBody;
  }
  __device__ __forceinline__ void meet(int body) const {
    meet_behind<S>(body, warp_ / (S::kWalkingWarps / S::kGroups));
  }

  // What a pair of tokens of a channel needs.
  struct Pair {
    float x[2];
    float decay[2][kStates];
    float B[2][kStates];
    float C[2][kStates];
  };
  __device__ __forceinline__ void load_factors(int rows, int pair, Pair& to) const {
#pragma unroll
    for (int s = 0; s < 2; ++s) load_factors(rows, 2 * pair + s, to.B[s], to.C[s]);
  }
  __device__ __forceinline__ void make_decays(const float4& cell, Pair& to) const {
    to.x[0] = cell.y;
    to.x[1] = cell.w;
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      to.decay[0][k] = exp2_fast(cell.x * A_[0][k]);
      to.decay[1][k] = exp2_fast(cell.z * A_[0][k]);
    }
  }

  // One channel. Few channels leave a thread alone with all that takes long: what a pair of tokens needs is
  // computed and loaded while the pair before is walked, dt a pair earlier.
  template <typename Keep>
  __device__ __forceinline__ void walk_apart(int bodies, const Keep& keep) {
    Pair here;
    load_factors(0, 0, here);
    make_decays(load_cell(0, 0, 0), here);
    float4 cell = load_cell(0, 0, 1);  // of the pair behind
    int rows = 0;
#pragma unroll 1
    for (int body = 0; body < bodies; ++body) {
      const int slot = cell_slot(body);
      const int slot_behind = cell_slot(body + 1);
      const int rows_here = rows;
      rows = rows_behind(rows);
      char* const to = sums_ + (body & 1) * S::kSumSlot;
#pragma unroll
      for (int pair = 0; pair < S::kPairs; ++pair) {
        Pair next;
        if (pair + 1 < S::kPairs)
          load_factors(rows_here, pair + 1, next);
        else
          load_factors(rows, 0, next);
        make_decays(cell, next);
        cell = pair + 2 < S::kPairs ? load_cell(0, slot, pair + 2)
                                    : load_cell(0, slot_behind, pair + 2 - S::kPairs);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          float y = 0.0F;
#pragma unroll
          for (int k = 0; k < kStates; ++k) {
            h_[0][k] = fmaf(here.decay[s][k], h_[0][k], here.x[s] * here.B[s][k]);
            y = k == 0 ? here.C[s][k] * h_[0][k] : fmaf(here.C[s][k], h_[0][k], y);
          }
          *reinterpret_cast<float*>(to + (2 * pair + s) * S::kSumRow) = y;
        }
        here = next;
      }
      keep(body);
      meet(body);
    }
  }

  // Several channels: dt and dt u of two tokens, and B and C of one, are on their way while what is before
  // them is walked.
  template <typename Keep>
  __device__ __forceinline__ void walk_together(int bodies, const Keep& keep) {
    float4 next_cell[kPerTeam];
    float next_B[kStates];
    float next_C[kStates];
    const auto load_cells = [&](int slot, int pair) {
#pragma unroll
      for (int c = 0; c < kPerTeam; ++c) next_cell[c] = load_cell(c, slot, pair);
    };
    load_cells(0, 0);
    load_factors(0, 0, next_B, next_C);
    int rows = 0;
#pragma unroll 1
    for (int body = 0; body < bodies; ++body) {
      const int slot = cell_slot(body);
      const int slot_behind = cell_slot(body + 1);
      const int rows_here = rows;
      rows = rows_behind(rows);
      float4 cell[kPerTeam];
      float y[2][kPerTeam];
#pragma unroll
      for (int token = 0; token < S::kBody; ++token) {
        const int s = token % 2;
        float B[kStates];
        float C[kStates];
#pragma unroll
        for (int k = 0; k < kStates; ++k) {
          B[k] = next_B[k];
          C[k] = next_C[k];
        }
        if (token + 1 < S::kBody)
          load_factors(rows_here, token + 1, next_B, next_C);
        else
          load_factors(rows, 0, next_B, next_C);
        if (s == 0) {
#pragma unroll
          for (int c = 0; c < kPerTeam; ++c) cell[c] = next_cell[c];
        } else if (token / 2 + 1 < S::kPairs) {
          load_cells(slot, token / 2 + 1);
        } else {
          load_cells(slot_behind, 0);
        }
#pragma unroll
        for (int c = 0; c < kPerTeam; ++c) {
          const float dt = s == 0 ? cell[c].x : cell[c].z;
          const float x = s == 0 ? cell[c].y : cell[c].w;
#pragma unroll
          for (int k = 0; k < kStates; ++k) {
            h_[c][k] = fmaf(exp2_fast(dt * A_[c][k]), h_[c][k], x * B[k]);
            y[s][c] = k == 0 ? C[k] * h_[c][k] : fmaf(C[k], h_[c][k], y[s][c]);
          }
        }
        if (s == 1) sum_over_team<S>(y, lane_, sums_ + (body & 1) * S::kSumSlot + token / 2 * S::kSumRow);
      }
      keep(body);
      meet(body);
    }
  }

  int warp_;
  int lane_;  // of the team
  int team_;
  const char* cells_[kPerTeam];
  const char* factors_;
  char* sums_;
  float A_[kPerTeam][kStates] = {};  // log2(e) A
  float h_[kPerTeam][kStates] = {};
};

}  // namespace krait::scan::channel_last
