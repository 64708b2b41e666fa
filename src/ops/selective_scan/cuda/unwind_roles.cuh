// What a warp that unwinds does with a tile of its 16 channels in shared memory, in the kernel whose other
// warps move (unwind_roles.cu).
#pragma once

#include <cstdint>

#include "ops/selective_scan/cuda/stage.cuh"

namespace krait::scan::roles {

inline constexpr int kUnwinders = 256;  // threads
inline constexpr int kUnwindingWarps = kUnwinders / 32;
inline constexpr int kMovingThreads = 256;
inline constexpr int kThreads = kUnwinders + kMovingThreads;
inline constexpr int kStates = 4;         // of a lane, of each of its channels
inline constexpr int kPerTeam = 2;        // channels that 4 lanes share
inline constexpr int kAll = 4 * kStates;  // states of a channel
inline constexpr int kSub = 4;            // tokens that are unwound at a time
inline constexpr int kSubs = kTile / kSub;
inline constexpr int kWarpChannels = 16;
// Two warps move for two that unwind, a group, and take its slots in turn.
inline constexpr int kGroup = 2;
inline constexpr int kGroups = kUnwindingWarps / kGroup;

struct Shape {
  static constexpr int kChannels = kUnwindingWarps * kWarpChannels;
};
using BAndC = Factors<kAll, kStates>;

// Shared memory, in bytes. Each unwinding warp has kSubs slots of cells, (token, channel) of a sub in each,
// and as many of states before a sub. What a sub gives takes their place: one half of the sums lies in its
// cells, the other one where the states were. A tile's subs lie in the slots from the first on or from the
// last on, in turn: the slot that is unwound first is free first, and it is the first that the next tile is
// walked from.
inline constexpr int kCell = 16;
inline constexpr int kCellRow = kWarpChannels * kCell;
inline constexpr int kSlot = kSub * kCellRow;
inline constexpr int kWarpSlots = kSubs * kSlot;
static_assert(kSlot == 32 * kStates * kPerTeam * static_cast<int>(sizeof(float)));
inline constexpr int kStarts = kUnwindingWarps * kWarpSlots + 64;  // halves have other banks than their cells
inline constexpr int kFactors = kStarts + kUnwindingWarps * kWarpSlots + 64;
inline constexpr int kFactorTile = BAndC::kFloats * static_cast<int>(sizeof(float));
// What each warp has summed for B and C in each part of a tile: (part, warp, token, B or C, state).
inline constexpr int kPartials = kFactors + 2 * kFactorTile;
inline constexpr int kParts = 2;
inline constexpr int kPartialToken = 2 * kAll * static_cast<int>(sizeof(float));
inline constexpr int kPartialWarp = kTile / kParts * kPartialToken;
inline constexpr int kPartialPart = kUnwindingWarps * kPartialWarp;
// What each moving thread has summed of dD and of ddelta_bias, four channels of each.
inline constexpr int kTotals = kPartials + kParts * kPartialPart;
inline constexpr int kTotal = 48;  // 32 in use
// delta_bias and D.
inline constexpr int kParameters = kTotals + kMovingThreads * kTotal;
inline constexpr int kBarriers = kParameters + 2 * Shape::kChannels * static_cast<int>(sizeof(float));
// Barriers: cells of a slot are there (of each group), their results are (the same), B and C of a tile are,
// sums of all warps for B and C are, these have been read.
inline constexpr int kCellsThere = kBarriers;
inline constexpr int kResultsThere = kCellsThere + 8 * kSubs * kGroups;
inline constexpr int kFactorsThere = kResultsThere + 8 * kSubs * kGroups;
inline constexpr int kPartialsThere = kFactorsThere + 2 * 8;
inline constexpr int kPartialsRead = kPartialsThere + 8 * kParts;
inline constexpr int kTicket = kPartialsRead + 8 * kParts;
inline constexpr int kItem = kTicket + 8;
inline constexpr int kBytes = kItem + static_cast<int>(sizeof(Item<Shape>));

// The slot of a sub, of the tile that is the `turn`-th to be unwound.
__device__ __forceinline__ int slot_of(int sub, int turn) { return turn % 2 == 0 ? sub : kSubs - 1 - sub; }

// Where channels lie in a row of cells: what movers read of 32 channels at a time has different banks.
__device__ __forceinline__ int place_of(int channel, int warp) {
  return channel ^ (channel / 8 + warp % kGroup * 2);
}

// Where a lane stands: kStates states of two channels. Neighbours have different channels and the same of B
// and C, those two lanes apart have the same cells: shared memory answers 16 bytes a lane in half as many
// passes then. The order of states and of channels differs from lane to lane (state_of, channel_of).
struct Stand {
  int part;  // of the states
  int team;  // of the warp's
  int order;

  __device__ explicit Stand(int lane)
      : part(lane / 2 % 2 * 2 + lane / 4 % 2), team(lane % 2 + lane / 8 * 2), order(lane / 8) {}
  __device__ __forceinline__ int channel_of(int c) const { return team * kPerTeam + (c ^ part % 2); }
  __device__ __forceinline__ int state_of(int k) const { return part * kStates + (k ^ order); }
};

// What a lane finds and leaves in shared memory, of slot 0 and row 0.
struct Place {
  const char* cells[kPerTeam];
  char* starts;
  char* results;
  const float* factors;
  char* partials;  // of C where the lane has an odd number

  __device__ Place(const Stand& at, char* shared, int warp, int lane) {
    char* const slots = shared + warp * kWarpSlots;
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c) cells[c] = slots + place_of(at.channel_of(c), warp) * kCell;
    starts = slots + kStarts + lane * kCell;
    results = slots + place_of(at.channel_of(0), warp) * kCell + (at.part >= 2 ? kStarts : 0);
    factors = reinterpret_cast<const float*>(shared + kFactors) + at.order * kAll + at.part * kStates;
    partials = shared + kPartials + warp * kPartialWarp +
               static_cast<int>(sizeof(float)) * (lane % 2 * kAll + at.part * kStates + at.order);
  }
};

// What a lane carries from tile to tile.
struct Carried {
  float A[kPerTeam][kStates];  // log2(e) A
  float g[kPerTeam][kStates];  // the gradient of the state
  float dA[kPerTeam][kStates];
};

__device__ __forceinline__ void store_start(char* to, const float (&h)[kPerTeam][kStates]) {
#pragma unroll
  for (int c = 0; c < kPerTeam; ++c)
    *reinterpret_cast<float4*>(to + c * 32 * kCell) = make_float4(h[c][0], h[c][1], h[c][2], h[c][3]);
}

// The state behind a sub.
__device__ __forceinline__ void walk_sub(const Place& place, int slot, const float* factors,
                                         const float (&A)[kPerTeam][kStates], float (&h)[kPerTeam][kStates]) {
#pragma unroll
  for (int s = 0; s < kSub; ++s) {
    float B[kStates];
    load_shared(factors + s * BAndC::kRow, B);
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c) {
      const auto step = *reinterpret_cast<const float2*>(place.cells[c] + slot * kSlot + s * kCellRow);
#pragma unroll
      for (int k = 0; k < kStates; ++k) h[c][k] = fmaf(exp2_fast(step.x * A[c][k]), h[c][k], step.y * B[k]);
    }
  }
}

// Decays and states of a sub's tokens, and what else they are unwound from.
struct Sub {
  float decay[kSub][kPerTeam][kStates];
  float before[kSub][kPerTeam][kStates];
  float after[kPerTeam][kStates];  // the last token
  float dt[kSub][kPerTeam];
  float input[kSub][kPerTeam];  // dt u
  float dy[kSub][kPerTeam];
  float B[kSub][kStates];
  float C[kSub][kStates];

  __device__ __forceinline__ Sub(const Place& place, int slot, const float* factors, const Carried& carried) {
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c) {
      const auto start = *reinterpret_cast<const float4*>(place.starts + slot * kSlot + c * 32 * kCell);
      after[c][0] = start.x;
      after[c][1] = start.y;
      after[c][2] = start.z;
      after[c][3] = start.w;
    }
#pragma unroll
    for (int s = 0; s < kSub; ++s) {
      load_shared(factors + s * BAndC::kRow, B[s]);
      load_shared(factors + s * BAndC::kRow + BAndC::kOne, C[s]);
#pragma unroll
      for (int c = 0; c < kPerTeam; ++c) {
        const auto cell = *reinterpret_cast<const float4*>(place.cells[c] + slot * kSlot + s * kCellRow);
        dt[s][c] = cell.x;
        input[s][c] = cell.y;
        dy[s][c] = cell.z;
      }
    }
#pragma unroll
    for (int s = 0; s < kSub; ++s)
#pragma unroll
      for (int c = 0; c < kPerTeam; ++c)
#pragma unroll
        for (int k = 0; k < kStates; ++k) {
          float& h = after[c][k];
          decay[s][c][k] = exp2_fast(dt[s][c] * carried.A[c][k]);
          before[s][c][k] = h;
          h = fmaf(decay[s][c][k], h, input[s][c] * B[s][k]);
        }
  }
};

// What the tokens of a sub give, of a lane's states and channels.
struct SubSums {
  float factors[kSub][2][kStates];  // to B and to C
  float y[kSub][kPerTeam];
  float dinput[kSub][kPerTeam];
  float ddt[kSub][kPerTeam];
  float dt[kSub];  // of the first channel

  // From the last token to the first.
  __device__ __forceinline__ SubSums(const Sub& sub, Carried& carried) {
#pragma unroll
    for (int s = kSub - 1; s >= 0; --s) {
      dt[s] = sub.dt[s][0];
#pragma unroll
      for (int c = 0; c < kPerTeam; ++c) {
#pragma unroll
        for (int k = 0; k < kStates; ++k) {
          const float h = s + 1 < kSub ? sub.before[s + 1][c][k] : sub.after[c][k];
          float& g = carried.g[c][k];
          y[s][c] = k == 0 ? sub.C[s][k] * h : fmaf(sub.C[s][k], h, y[s][c]);
          factors[s][1][k] = c == 0 ? sub.dy[s][c] * h : fmaf(sub.dy[s][c], h, factors[s][1][k]);
          g = fmaf(sub.dy[s][c], sub.C[s][k], g);
          factors[s][0][k] = c == 0 ? g * sub.input[s][c] : fmaf(g, sub.input[s][c], factors[s][0][k]);
          dinput[s][c] = k == 0 ? g * sub.B[s][k] : fmaf(g, sub.B[s][k], dinput[s][c]);
          g *= sub.decay[s][c][k];
          // Through exp(dt A) h: the gradient of the exponent dt A.
          const float dexponent = g * sub.before[s][c][k];
          ddt[s][c] = k == 0 ? dexponent * carried.A[c][k] : fmaf(dexponent, carried.A[c][k], ddt[s][c]);
          carried.dA[c][k] = fmaf(dexponent, sub.dt[s][c], carried.dA[c][k]);
        }
      }
    }
  }

  // Sums over lanes, to where they belong. What a lane needs of its partner stands at the same place there,
  // as the order of states (and of channels) differs.
  __device__ __forceinline__ void put(const Place& place, int slot, char* partials, int lane) {
    constexpr unsigned kWarp = 0xffffffffU;
    constexpr int kPartners[] = {8, 16};  // lanes of the other order
#pragma unroll
    for (int half = kStates / 2; half > 0; half /= 2)
#pragma unroll
      for (int s = 0; s < kSub; ++s)
#pragma unroll
        for (int factor = 0; factor < 2; ++factor)
#pragma unroll
          for (int k = 0; k < half; ++k)
            factors[s][factor][k] +=
                __shfl_xor_sync(kWarp, factors[s][factor][k + half], kPartners[half / 2]);
    // Neighbours of one order share out B and C.
    const bool has_c = lane % 2 != 0;
#pragma unroll
    for (int s = 0; s < kSub; ++s) {
      const float sent = has_c ? factors[s][0][0] : factors[s][1][0];
      const float kept = has_c ? factors[s][1][0] : factors[s][0][0];
      *reinterpret_cast<float*>(partials + s * kPartialToken) = kept + __shfl_xor_sync(kWarp, sent, 1);
    }
#pragma unroll
    for (int s = 0; s < kSub; ++s) {
      y[s][0] += __shfl_xor_sync(kWarp, y[s][1], 4);
      dinput[s][0] += __shfl_xor_sync(kWarp, dinput[s][1], 4);
      ddt[s][0] += __shfl_xor_sync(kWarp, ddt[s][1], 4);
      *reinterpret_cast<float4*>(place.results + slot * kSlot + s * kCellRow) =
          make_float4(dt[s], y[s][0], dinput[s][0], ddt[s][0]);
    }
  }
};

}  // namespace krait::scan::roles
