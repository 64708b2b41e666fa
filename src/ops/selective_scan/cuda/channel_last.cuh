// The blocks of the scan's forward for channels side by side, and what their movers bring from and to memory.
#pragma once

#include <cstdint>

#include "core/cuda/async_copy.cuh"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/raw.cuh"
#include "ops/selective_scan/cuda/stage.cuh"

namespace krait::scan::channel_last {

inline constexpr int kThreads = kWalkers + kMovers;

struct Operands {
  Inputs<float> in;
  AnyView<3> out;
  StateView<float, 3> last_state;
  float* checkpoints;  // (K, N, D)
  Pieces pieces;
  const float* carried;  // the state before each piece that is not the first of its run: (piece, N, D)
};

// A team of lanes has kPerTeam channels, 16 / kLanes states of each in every lane.
template <typename T_, int kLanes_, int kPerTeam_>
struct Shape : Teams<kLanes_, 16 / kLanes_, kPerTeam_> {
  using T = T_;
  using Base = Teams<kLanes_, 16 / kLanes_, kPerTeam_>;
  // Two states of B and two of C are one load.
  static constexpr bool kTwined = Base::kStates == 2;
  using BAndC = Factors<Base::kAll, 1, kTwined>;
  static constexpr int kResident = 2;  // blocks that a multiprocessor has registers for
  static constexpr bool kApart = kPerTeam_ == 1;
  static constexpr int kWalkingWarps = kWalkers / 32;
  static constexpr int kWarpChannels = 32 / kLanes_ * kPerTeam_;
  // A mover brings kTogether channels of a token, kTokenLanes lanes up to 64 bytes of 16-bit elements, of a
  // body as many tokens as there are rounds. The warps that walk and move the same channels are a group.
  static constexpr int kTogether = 4;
  static constexpr int kAcross = kWarpChannels / kTogether;  // lanes
  static constexpr int kGroups = kPerTeam_;
  static constexpr int kGroupThreads = kThreads / kGroups;
  static constexpr int kTokenLanes = Base::kChannels / kGroups / kTogether;
  static constexpr int kRounds = kPerTeam_ == 4 ? 2 : 1;
  static constexpr int kRound = kMovers * kTogether / Base::kChannels;  // tokens
  static constexpr int kBody = kRounds * kRound;
  static constexpr int kPairs = kBody / 2;
  static constexpr int kBodies = kTile / kBody;  // of a tile of B and C
  // Tiles of B and C that are there beside the one that is walked: its last body looks into the next one.
  static constexpr int kTilesAhead = kBodies == 1 ? 2 : 1;

  // Shared memory, in bytes. Rings have powers of two as sizes.
  // Of u, delta and z as they come, a mover's own: the bodies from the one whose outputs are made to the last
  // one that is on its way.
  static constexpr int kAhead = kRounds == 1 || sizeof(T) == 2 ? 5 : 1;
  static constexpr int kRawBytes = kTogether * static_cast<int>(sizeof(T));
  static constexpr int kRawRound = kMovers * kRawBytes;
  static constexpr int kRawSlot = kRounds * kRawRound;
  static constexpr int kRawRing = (kAhead + 3) * kRawSlot;
  // Each walking warp has a ring of dt and dt u, of which two tokens of a channel lie side by side, and two
  // slots of sums over states: (token, team, lane), or of teams that have summed them (pair of tokens, place,
  // token). Channels are permuted (channel_at), and what belongs to different warps or tokens begins in
  // different banks, so that neither who writes nor who reads finds one bank twice.
  static constexpr int kCellPair = 16 * kWarpChannels;
  static constexpr int kCellSlot = kPairs * kCellPair;
  static constexpr int kCellRing = 4 * kCellSlot;
  static constexpr int kCellWarp = kCellRing + 16 * kAcross;
  static constexpr int kSumTeam = 4 * kLanes_;  // of kApart
  static constexpr int kSumRow = kPerTeam_ == 4 ? 320 : kPerTeam_ == 2 ? 160 : 128;
  static constexpr int kSumSlot = (kApart ? kBody : kPairs) * kSumRow;
  static constexpr int kSumWarp = 2 * kSumSlot + (kApart ? 32 : 16 * kAcross);
  static constexpr int kFactorBody = kBody * BAndC::kRow * static_cast<int>(sizeof(float));
  static constexpr int kFactorRing = 3 * kBodies * kFactorBody;
  static constexpr int kCells = 3 * kRawRing;
  static constexpr int kSums = kCells + kWalkingWarps * kCellWarp;
  static constexpr int kFactors = kSums + kWalkingWarps * kSumWarp;
  static constexpr int kBytes = kFactors + kFactorRing;
  static_assert(kSumSlot % 128 == 0 && kCellRing % 128 == 0);

  __device__ static constexpr int channel_at(int place) {
    return place % kAcross * kTogether + place / kAcross;
  }
};

// What a thread brings from and to memory.
template <typename S>
struct Mover {
  using T = typename S::T;
  using Bits = Raw<T>;
  static constexpr int kTogether = S::kTogether;

  char* raw;  // the thread's place in the first slot of each ring
  char* cells;
  const char* sums;
  int odd;     // whether the token is
  int count;   // tokens of the piece; 0 where the channels do not exist
  int to_ask;  // the token to ask for next
  int to_finish;
  float bias[kTogether];
  float skip[kTogether];
  const char* u;  // of the round asked for last
  const char* delta;
  const char* z;
  char* out;     // of the round finished last
  int step;      // 1, or -1 of a reversed piece
  int u_stride;  // bytes
  int delta_stride;
  int z_stride;
  int out_stride;

  __device__ Mover(const Operands& o, const Item<S>& item, char* shared, int mover)
      : raw(shared + mover * S::kRawBytes) {
    const Inputs<float>& in = o.in;
    const Piece& piece = item.piece;
    const int warp = mover / 32;
    const int token = warp / S::kGroups * (32 / S::kTokenLanes) + mover % 32 / S::kTokenLanes;
    const int channel = warp % S::kGroups * (S::kChannels / S::kGroups) + mover % S::kTokenLanes * kTogether;
    const bool exists = channel < item.channels;
    const int walker = channel / S::kWarpChannels;  // warp
    const int place = channel % S::kWarpChannels / kTogether;
    cells =
        shared + S::kCells + walker * (S::kCellWarp) + token / 2 * S::kCellPair + token % 2 * 8 + place * 16;
    sums = shared + S::kSums + walker * (S::kSumWarp) +
           (S::kApart ? token * S::kSumRow + place * S::kSumTeam
                      : token / 2 * S::kSumRow + token % 2 * 4 + place * 8);
    odd = token % 2;
    count = exists ? static_cast<int>(piece.count) : 0;
    to_ask = token;
    to_finish = token;
    const std::int64_t d = item.first + channel;
#pragma unroll
    for (int e = 0; e < kTogether; ++e) {
      bias[e] = exists && in.delta_bias ? in.delta_bias.load(d + e) : 0.0F;
      skip[e] = exists && in.D ? in.D.load(d + e) : 0.0F;
    }
    step = static_cast<int>(piece.step);
    const auto at = [&](const AnyView<3>& view, int& stride) {
      constexpr int kSize = sizeof(T);
      stride = static_cast<int>(view.stride[2]) * kSize;
      return static_cast<char*>(view.data) + (piece.row * view.stride[0] + d) * kSize +
             (piece.start + (token - S::kRound) * piece.step) * stride;
    };
    u = at(in.u, u_stride);
    delta = at(in.delta, delta_stride);
    z = at(in.z, z_stride);
    out = at(o.out, out_stride);
  }

  __device__ __forceinline__ char* raw_of(int body, int round) const {
    return raw + (body * S::kRawSlot & (S::kRawRing - 1)) + round * S::kRawRound;
  }

  __device__ __forceinline__ void ask(int body) {
#pragma unroll
    for (int round = 0; round < S::kRounds; ++round) {
      char* const to = raw_of(body, round);
      u += std::int64_t{S::kRound * step} * u_stride;
      delta += std::int64_t{S::kRound * step} * delta_stride;
      z += std::int64_t{S::kRound * step} * z_stride;
      if (to_ask < count) {
        cuda::copy_async<S::kRawBytes>(to, u);
        cuda::copy_async<S::kRawBytes>(to + S::kRawRing, delta);
        cuda::copy_async<S::kRawBytes>(to + 2 * S::kRawRing, z);
      } else {
        // No step: softplus makes 0 of it.
        Bits bits;
        bits.fill(0);
        bits.store(to);
        bits.store(to + 2 * S::kRawRing);
        bits.fill(kMinusInfinity<T>);
        bits.store(to + S::kRawRing);
      }
      to_ask += S::kRound;
    }
    cuda::commit_copies();
  }

  // dt and dt u of a body.
  __device__ __forceinline__ void prepare(int body) const {
#pragma unroll
    for (int round = 0; round < S::kRounds; ++round) {
      const char* const from = raw_of(body, round);
      char* const to =
          cells + (body * S::kCellSlot & (S::kCellRing - 1)) + round * (S::kRound / 2) * S::kCellPair;
      float x[kTogether];
      float dt[kTogether];
      Bits bits;
      bits.load(from);
      bits.to_floats(x);
      bits.load(from + S::kRawRing);
      bits.to_floats(dt);
#pragma unroll
      for (int e = 0; e < kTogether; ++e) {
        dt[e] = softplus_fast(dt[e] + bias[e]);
        *reinterpret_cast<float2*>(to + e * S::kAcross * 16) = make_float2(dt[e], dt[e] * x[e]);
      }
    }
  }

  // The outputs of a body.
  __device__ __forceinline__ void finish(int body) {
#pragma unroll
    for (int round = 0; round < S::kRounds; ++round) {
      const char* const own = raw_of(body, round);
      const char* const from =
          sums + (body & 1) * S::kSumSlot + round * (S::kApart ? S::kRound : S::kRound / 2) * S::kSumRow;
      float u_here[kTogether];
      float z_here[kTogether];
      float y[kTogether];
      Bits bits;
      bits.load(own);
      bits.to_floats(u_here);
      bits.load(own + 2 * S::kRawRing);
      bits.to_floats(z_here);
#pragma unroll
      for (int e = 0; e < kTogether; ++e) {
        y[e] = sum_of(from, e);
        y[e] = fmaf(skip[e], u_here[e], y[e]) * (z_here[e] * cuda::quick_sigmoid(z_here[e]));
      }
      out += std::int64_t{S::kRound * step} * out_stride;
      if (to_finish < count) store_packed(reinterpret_cast<T*>(out), y);
      to_finish += S::kRound;
    }
  }

 private:
  // Of channel e, over all states.
  __device__ __forceinline__ float sum_of(const char* from, int e) const {
    if constexpr (S::kApart) {
      // Where a team's sums are 32 bytes, tokens of different parity take them in different order: a row is
      // all banks long.
      float result = 0.0F;
#pragma unroll
      for (int i = 0; i < S::kSumTeam; i += 16) {
        const int at = S::kSumTeam == 16 ? 0 : i ^ (odd * 16);
        const auto some = *reinterpret_cast<const float4*>(from + e * S::kAcross * S::kSumTeam + at);
        const float sum = (some.x + some.y) + (some.z + some.w);
        result = i == 0 ? sum : result + sum;
      }
      return result;
    } else {
      return *reinterpret_cast<const float*>(from + e * S::kAcross * 8);
    }
  }
};

}  // namespace krait::scan::channel_last
