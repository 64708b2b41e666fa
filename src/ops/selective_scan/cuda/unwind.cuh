// What the backward does with a tile in shared memory: forward from its checkpoint, and back.
#pragma once

#include "ops/selective_scan/cuda/stage.cuh"

namespace krait::scan {

inline constexpr float kLn2 = 0.6931471805599453F;

// Where row and first channel of an item are in each tensor, and in the sums of dB and dC, in elements: kept
// in shared memory, where they cost no registers.
enum Base { kU, kDelta, kDout, kZ, kDu, kDdelta, kDz, kTokenSums, kBaseCount };

// kSub tokens are unwound at a time. Sums over channels of kFlush tokens of each warp wait in shared memory.
template <int kLanes, int kStates, int kPerTeam, int kSub_>
struct UnwindShape : Teams<kLanes, kStates, kPerTeam> {
  using Teams = scan::Teams<kLanes, kStates, kPerTeam>;
  static constexpr int kTeams = 32 / kLanes;  // of a warp
  // The order of a thread's states differs from team to team: place k has state k ^ order() of them. B and C
  // lie in shared memory in each of the orders, of which there is room for as many.
  static constexpr int kRoom = kPerTeam > 1 ? 4 : Teams::kAll <= 32 ? 2 : 1;
  static constexpr int kMost = kStates < kTeams ? kStates : kTeams;
  static constexpr int kOrders = kMost < kRoom ? kMost : kRoom;
  __device__ __forceinline__ static int order() {
    return static_cast<int>(threadIdx.x) % 32 / kLanes % kOrders;
  }
  using BAndC = Factors<Teams::kAll, kOrders>;
  static constexpr int kSub = kSub_;
  static constexpr int kSubs = kTile / kSub;
  static constexpr int kFlush = Teams::kAll <= 16 ? kTile : Teams::kAll <= 64 ? 512 / Teams::kAll : kSub;
  static_assert(kFlush % kSub == 0 && kFlush <= kTile);

  // Where two lanes have summed over states of a channel, each leaves its half: the upper one where states
  // before the sub were, which takes as much room as cells.
  static constexpr bool kHalves = kLanes == 2 * kPerTeam && Teams::kAll == 4 * kSub;

  // Where each part of shared memory starts, in floats.
  static constexpr int kFactors = 4 * kTile * Teams::kChannels;
  static constexpr int kStarts = kFactors + BAndC::kFloats + 16;  // halves have other banks than their cells
  static constexpr int kPartials = kStarts + kSubs * kStates * kPerTeam * kWalkers;
  static constexpr int kPartial = kFlush * 2 * Teams::kAll;  // of a warp: (token, B or C, state)
  static constexpr int kTotals = kPartials + kWalkers / 32 * kPartial;
  static constexpr int kTotal = 20;  // of a thread: 16 in use
  static constexpr int kBias = kTotals + kTotal * kMovers;
  static constexpr int kSkip = kBias + Teams::kChannels;
  static constexpr int kBases = kSkip + Teams::kChannels;
  static constexpr int kTicket = kBases + 2 * kBaseCount;
  static constexpr int kFloats = kTicket + 2;
};

// A cell for each (token, channel): dt, dt u, dy, nothing; then dt and the sums over states of y, of the
// gradient of dt u and of that of dt by log2(e). Threads write 8 channels each, one after the other: their
// order keeps them in different banks.
template <typename S>
__device__ __forceinline__ int cell_at(int row, int channel) {
  return row * S::kChannels + (channel ^ (channel / 8 & 7));
}

// The states of a thread before the tokens of a sub, in shared memory: 16 bytes of each thread side by side.
// A warp's lie where cells of its channels do among the cells.
template <typename S>
struct Starts {
  static constexpr int kCount = S::kStates * S::kPerTeam;
  static constexpr int kTogether = kCount < 4 ? kCount : 4;
  static constexpr int kRow = S::kHalves ? 32 / S::kLanes * S::kPerTeam : 32;  // cells of a warp
  float* shared;

  __device__ __forceinline__ Packed<float, kTogether>* at(int sub, int i) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    return reinterpret_cast<Packed<float, kTogether>*>(shared) +
           (sub * (kCount / kTogether) + i / kTogether) * kWalkers +
           (lane / kRow * (kWalkers / 32) + warp) * kRow + lane % kRow;
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

// Where a thread finds its part of a tile in shared memory. A row is a constant further on than the one
// before it, so that the addresses of a sub's rows are one register each.
template <typename S>
struct Place {
  static constexpr int kRow = S::BAndC::kRow;

  const float* factors;
  float4* cells[S::kPerTeam];
  float4* result;  // where this lane writes sums to
  float* partial;  // of B at this lane's first state

  __device__ __forceinline__ explicit Place(float* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % S::kLanes;
    const int first = thread / S::kLanes * S::kPerTeam;
    factors = shared + S::kFactors + S::order() * S::kAll + lane * S::kStates;
    auto* const all = reinterpret_cast<float4*>(shared);
#pragma unroll
    for (int c = 0; c < S::kPerTeam; ++c) cells[c] = all + cell_at<S>(0, first + (c ^ (lane % S::kPerTeam)));
    result = cells[0] + (S::kHalves && lane >= S::kPerTeam ? S::kStarts / 4 : 0);
    partial = shared + S::kPartials + thread / 32 * S::kPartial + lane * S::kStates + S::order();
  }
};

// Of what kSteps tokens give to B (v[.][0]) and to C (v[.][1]) at the states of a thread, sums over the teams
// of a warp: put(step, factor, k, sum) in one lane of those that have the state, of state k + order().
template <typename S, int kSteps, typename F>
__device__ __forceinline__ void sum_over_teams(float (&v)[kSteps][2][S::kStates], F&& put) {
  // What a lane needs of its partner stands at the same place there, as the order of states differs.
#pragma unroll
  for (int half = S::kOrders / 2; half > 0; half /= 2)
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int factor = 0; factor < 2; ++factor)
#pragma unroll
        for (int k = 0; k < S::kStates; ++k)
          if (k % S::kOrders < half)
            v[s][factor][k] += __shfl_xor_sync(0xffffffffU, v[s][factor][k + half], half * S::kLanes);
  // The other teams share out what is left.
  constexpr int kEach = S::kStates / S::kOrders;
  float left[kSteps][2 * kEach];
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
#pragma unroll
    for (int i = 0; i < 2 * kEach; ++i) left[s][i] = v[s][i / kEach][i % kEach * S::kOrders];
  int count = 2 * kEach;
  int first = 0;
  bool alone = true;
#pragma unroll
  for (int bit = 16; bit >= S::kOrders * S::kLanes; bit /= 2) {
    const bool upper = (threadIdx.x & bit) != 0;
    const bool share = count > 1;
    if (share) count /= 2;
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float sent = share && !upper ? left[s][i + (share ? count : 0)] : left[s][i];
        const float kept = share && upper ? left[s][i + (share ? count : 0)] : left[s][i];
        left[s][i] = kept + __shfl_xor_sync(0xffffffffU, sent, bit);
      }
    if (share)
      first += upper ? count : 0;
    else
      alone = alone && !upper;
  }
  if (alone)
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int i = 0; i < count; ++i)
        put(s, (first + i) / kEach, (first + i) % kEach * S::kOrders, left[s][i]);
}

// From the state h before a tile on: the states before each sub but the first.
template <typename S>
__device__ __forceinline__ void walk_tile(float* shared, int subs, const float (&A)[S::kPerTeam][S::kStates],
                                          float (&h)[S::kPerTeam][S::kStates]) {
  const Place<S> place(shared);
  const Starts<S> starts = {shared + S::kStarts};
  starts.store(0, h);
#pragma unroll 1
  for (int sub = 0; sub + 1 < subs; ++sub) {
    const float* const factors = place.factors + sub * S::kSub * Place<S>::kRow;
    const int first_cell = sub * S::kSub * S::kChannels;
#pragma unroll
    for (int s = 0; s < S::kSub; ++s) {
      float B[S::kStates];
      load_shared(factors + s * Place<S>::kRow, B);
#pragma unroll
      for (int c = 0; c < S::kPerTeam; ++c) {
        const auto step = *reinterpret_cast<const float2*>(place.cells[c] + first_cell + s * S::kChannels);
#pragma unroll
        for (int k = 0; k < S::kStates; ++k)
          h[c][k] = fmaf(exp2_fast(step.x * A[c][k]), h[c][k], step.y * B[k]);
      }
    }
    starts.store(sub + 1, h);
  }
}

// Decays and states of a sub's tokens, and what else they are unwound from.
template <typename S>
struct Sub {
  float decay[S::kSub][S::kPerTeam][S::kStates];
  float before[S::kSub][S::kPerTeam][S::kStates];
  float after[S::kPerTeam][S::kStates];  // the last token
  float dt[S::kSub][S::kPerTeam];
  float input[S::kSub][S::kPerTeam];  // dt u
  float dy[S::kSub][S::kPerTeam];
  float B[S::kSub][S::kStates];
  float C[S::kSub][S::kStates];

  __device__ __forceinline__ Sub(float* shared, const Place<S>& place, int sub, const Carried<S>& carried) {
    const float* const factors = place.factors + sub * S::kSub * Place<S>::kRow;
    const int first_cell = sub * S::kSub * S::kChannels;
    Starts<S>{shared + S::kStarts}.load(sub, after);
#pragma unroll
    for (int s = 0; s < S::kSub; ++s) {
      load_shared(factors + s * Place<S>::kRow, B[s]);
      load_shared(factors + s * Place<S>::kRow + S::BAndC::kOne, C[s]);
#pragma unroll
      for (int c = 0; c < S::kPerTeam; ++c) {
        const float4 cell = place.cells[c][first_cell + s * S::kChannels];
        dt[s][c] = cell.x;
        input[s][c] = cell.y;
        dy[s][c] = cell.z;
      }
    }
#pragma unroll
    for (int s = 0; s < S::kSub; ++s)
#pragma unroll
      for (int c = 0; c < S::kPerTeam; ++c)
#pragma unroll
        for (int k = 0; k < S::kStates; ++k) {
          float& h = after[c][k];
          decay[s][c][k] = exp2_fast(dt[s][c] * carried.A[c][k]);
          before[s][c][k] = h;
          h = fmaf(decay[s][c][k], h, input[s][c] * B[s][k]);
        }
  }
};

// What the tokens of a sub give, of a thread's states and channels.
template <typename S>
struct SubSums {
  float factors[S::kSub][2][S::kStates];  // to B and to C
  float y[S::kSub][S::kPerTeam];
  float dinput[S::kSub][S::kPerTeam];
  float ddt[S::kSub][S::kPerTeam];
  float dt[S::kSub];  // of channel lane % kPerTeam

  // From the last token to the first.
  __device__ __forceinline__ SubSums(const Sub<S>& sub, Carried<S>& carried) {
#pragma unroll
    for (int s = S::kSub - 1; s >= 0; --s) {
#pragma unroll
      for (int k = 0; k < S::kStates; ++k) factors[s][0][k] = factors[s][1][k] = 0.0F;
      dt[s] = sub.dt[s][0];
#pragma unroll
      for (int c = 0; c < S::kPerTeam; ++c) {
        y[s][c] = dinput[s][c] = ddt[s][c] = 0.0F;
#pragma unroll
        for (int k = 0; k < S::kStates; ++k) {
          const float h = s + 1 < S::kSub ? sub.before[s + 1][c][k] : sub.after[c][k];
          float& g = carried.g[c][k];
          y[s][c] = fmaf(sub.C[s][k], h, y[s][c]);
          factors[s][1][k] = fmaf(sub.dy[s][c], h, factors[s][1][k]);
          g = fmaf(sub.dy[s][c], sub.C[s][k], g);
          factors[s][0][k] = fmaf(g, sub.input[s][c], factors[s][0][k]);
          dinput[s][c] = fmaf(g, sub.B[s][k], dinput[s][c]);
          g *= sub.decay[s][c][k];
          // Through exp(dt A) h: the gradient of the exponent dt A.
          const float dexponent = g * sub.before[s][c][k];
          ddt[s][c] = fmaf(dexponent, carried.A[c][k], ddt[s][c]);
          carried.dA[c][k] = fmaf(dexponent, sub.dt[s][c], carried.dA[c][k]);
        }
      }
    }
  }
  // Sums over lanes, to where they belong.
  __device__ __forceinline__ void put(const Place<S>& place, int sub) {
    float* const partial = place.partial + sub * S::kSub % S::kFlush * 2 * S::kAll;
    sum_over_teams<S>(factors, [&](int s, int factor, int k, float sum) {
      partial[s * 2 * S::kAll + factor * S::kAll + k] = sum;
    });
    float4* const result = place.result + sub * S::kSub * S::kChannels;
    if constexpr (S::kHalves) {
      sum_over_channels<S>(y);
      sum_over_channels<S>(dinput);
      sum_over_channels<S>(ddt);
#pragma unroll
      for (int s = 0; s < S::kSub; ++s)
        result[s * S::kChannels] = make_float4(dt[s], y[s][0], dinput[s][0], ddt[s][0]);
    } else {
      sum_over_team<S>(y, [&](int s, float sum) { result[s * S::kChannels].y = sum; });
      sum_over_team<S>(dinput, [&](int s, float sum) { result[s * S::kChannels].z = sum; });
      sum_over_team<S>(ddt, [&](int s, float sum) { result[s * S::kChannels].w = sum; });
    }
  }
};

// The tokens of a tile from the last sub to the first: decays and states into registers, then back. Those of
// the next sub are computed while sums of the one before are on their way from lane to lane, as both take
// long. done(sub): all that this thread puts for the sub and those behind it is there.
template <typename S, typename F>
__device__ __forceinline__ void unwind_tile(float* shared, int subs, Carried<S>& carried, F&& done) {
  const Place<S> place(shared);
  Sub<S> here(shared, place, subs - 1, carried);
#pragma unroll 1
  for (int sub = subs - 1; sub > 0; --sub) {
    SubSums<S> sums(here, carried);
    // The team's lanes alone read cells of its channels, and all have those of this sub.
    __syncwarp();
    here = Sub<S>(shared, place, sub - 1, carried);
    sums.put(place, sub);
    done(sub);
  }
  SubSums<S> sums(here, carried);
  __syncwarp();
  sums.put(place, 0);
  done(0);
}

}  // namespace krait::scan
