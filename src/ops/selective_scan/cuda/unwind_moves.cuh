#pragma once
// What the backward of the scan moves between memory and the shared memory of a block: the elements of a tile
// on their way in and out, and the sums for B and C.
#include <cstdint>

#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/stage.cuh"
#include "ops/selective_scan/cuda/unwind.cuh"

namespace krait::scan {

struct UnwindOperands {
  UnwindOperands(const Problem& p, const Gradients& gradients, const PartialSums& sums, const Pieces& cut)
      : in(p),
        dout(gradients.dout),
        dlast_state(gradients.dlast_state),
        checkpoints(static_cast<const float*>(gradients.checkpoints.raw())),
        du(gradients.du),
        ddelta(gradients.ddelta),
        dz(gradients.dz),
        dinitial_state(gradients.dinitial_state),
        dB(floats(sums.dB)),
        dC(floats(sums.dC)),
        dA(floats(sums.dA)),
        dD(floats(sums.dD)),
        ddelta_bias(floats(sums.ddelta_bias)),
        pieces(cut),
        length(p.u.size(2)),
        checkpoint_size(p.d_state * p.channels),
        by_channel(p.u.stride(1) == 1 || p.u.stride(2) != 1) {}

  static float* floats(const Tensor& t) { return t ? static_cast<float*>(t.raw()) : nullptr; }

  Inputs<float> in;
  AnyView<3> dout;
  StateView<float, 3> dlast_state;
  const float* checkpoints;  // (K, N, D)
  AnyView<3> du;
  AnyView<3> ddelta;
  AnyView<3> dz;
  StateView<float, 3> dinitial_state;
  float* dB;  // (block of channels, B L, G, N)
  float* dC;
  float* dA;  // (piece, N, D)
  float* dD;  // (piece, D)
  float* ddelta_bias;
  const float* carried = nullptr;  // of rows in pieces: gradients_between
  // Of rows whose pieces are walked in turn, from the last one on: the gradient of the state (B, N, D) that a
  // piece hands on to the one before it, and the next item, followed by how many pieces of each row and block
  // of channels are done.
  float* handed = nullptr;
  int* turns = nullptr;
  Pieces pieces;
  std::int64_t length;
  std::int64_t checkpoint_size;
  bool by_channel;
};

// What the warps have summed for B and C at tokens [first, first + kFlush) of a tile, warp after warp.
template <typename S>
__device__ __forceinline__ void flush(const UnwindOperands& o, const float* shared, const Tile32& tile,
                                      int first) {
  constexpr int kQuads = S::kAll / 4;
  constexpr int kRounds = S::kFlush * 2 * kQuads / kWalkers;
  static_assert(kRounds * kWalkers == S::kFlush * 2 * kQuads && kWalkers % (2 * kQuads) == 0);
  const int thread = static_cast<int>(threadIdx.x);
  const auto d_state = static_cast<int>(o.in.d_state);
  const int n = thread % kQuads * 4;
  const bool is_c = thread / kQuads % 2 != 0;
  float* const all = is_c ? o.dC : o.dB;
  if (all == nullptr || n >= d_state) return;
  float* const sums = all + *reinterpret_cast<const std::int64_t*>(shared + S::kBases + 2 * kTokenSums);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int row = first + thread / (2 * kQuads) + round * (kWalkers / (2 * kQuads));
    if (row >= tile.count) continue;
    const auto* from = reinterpret_cast<const float4*>(shared + S::kPartials) + thread + round * kWalkers;
    float4 sum = *from;
#pragma unroll
    for (int warp = 1; warp < kWalkers / 32; ++warp) {
      const float4 more = from[warp * S::kPartial / 4];
      sum.x += more.x;
      sum.y += more.y;
      sum.z += more.z;
      sum.w += more.w;
    }
    float* const to = sums + tile.position(tile.row(row)) * (o.in.groups * d_state) + n;
    if (d_state % 4 == 0) {
      *reinterpret_cast<float4*>(to) = sum;
    } else {
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (n + j < d_state) to[j] = values[j];
    }
  }
}

// The elements of u, delta, dout and z of a tile that a thread has.
template <typename S, bool kByChannel>
struct UnwindMovement {
  using Moves = MoverShare<S::kChannels, kByChannel>;
  using Along = Track<S::kChannels, kByChannel>;
  using NarrowAlong = NarrowTrack<S::kChannels, kByChannel>;
  static constexpr int kTogether = Moves::kTogether;
  static constexpr int kRounds = Moves::kRounds;
  using Elements = cuda::Bits<kTogether>;
  using Narrow = cuda::NarrowBits<kTogether>;

  const UnwindOperands& o;
  const Item<S>& item;
  const std::int64_t* bases;
  Moves moves;
  bool packed = true;  // elements of whole tiles lie side by side and aligned
  bool narrow = true;  // and have one type of 16 bits

  __device__ UnwindMovement(const UnwindOperands& operands, const Item<S>& of, const Moves& share,
                            const float* shared)
      : o(operands),
        item(of),
        bases(reinterpret_cast<const std::int64_t*>(shared + S::kBases)),
        moves(share) {
    narrow = cuda::is_narrow(o.in.u.dtype);
    const auto check = [&](const AnyView<3>& view) {
      packed = packed && track(view).packed(item.piece, item.channels);
      narrow = narrow && NarrowAlong::fits(view) && (view.data == nullptr || view.dtype == o.in.u.dtype);
    };
    check(o.in.u);
    check(o.in.delta);
    check(o.dout);
    check(o.in.z);
    check(o.du);
    check(o.ddelta);
    check(o.dz);
    narrow = narrow && packed && o.length <= INT32_MAX;
  }
  __device__ __forceinline__ Along track(const AnyView<3>& view) const {
    return Along(view, moves, item.piece, item.first);
  }
  __device__ __forceinline__ NarrowAlong narrow_track(Base which, const AnyView<3>& view,
                                                      const Tile32& tile) const {
    return NarrowAlong(view, moves, bases[which], static_cast<int>(tile.low));
  }

  // As they come from memory.
  struct Raw {
    Narrow u[kRounds];
    Narrow delta[kRounds];
    Narrow dout[kRounds];
    Narrow z[kRounds];
  };
  __device__ __forceinline__ void load(const Tile32& tile, Raw& to) const {
    const auto one = [&](Base which, const AnyView<3>& view, Narrow(&bits)[kRounds]) {
      const NarrowAlong from = narrow_track(which, view, tile);
#pragma unroll
      for (int round = 0; round < kRounds; ++round) from.load(round, bits[round]);
    };
    one(kU, o.in.u, to.u);
    one(kDelta, o.in.delta, to.delta);
    one(kDout, o.dout, to.dout);
    // Without a condition, behind which what was loaded would have to wait in local memory.
    one(o.in.z ? kZ : kU, o.in.z ? o.in.z : o.in.u, to.z);
  }
  __device__ __forceinline__ void prefetch(const Tile32& tile) const {
    if (!packed) return;
    const auto one = [&](const AnyView<3>& view) {
      if (view.data == nullptr) return;
      const Along from = track(view);
#pragma unroll
      for (int round = 0; round < kRounds; ++round) from.prefetch(tile, round);
    };
    one(o.in.u);
    one(o.in.delta);
    one(o.dout);
    one(o.in.z);
  }

  struct Numbers {
    float u[kTogether];
    float delta[kTogether];
    float dout[kTogether];
    float z[kTogether];
  };
  template <typename T>
  __device__ __forceinline__ static void widen(const Raw& from, int round, Numbers& to) {
    from.u[round].template to_floats<T>(to.u);
    from.delta[round].template to_floats<T>(to.delta);
    from.dout[round].template to_floats<T>(to.dout);
    from.z[round].template to_floats<T>(to.z);
  }
  __device__ __forceinline__ void load_any(const Tile32& tile, int round, Numbers& to) const {
    Elements bits[4] = {};
    track(o.in.u).load(tile, round, item.channels, bits[0]);
    track(o.in.delta).load(tile, round, item.channels, bits[1]);
    track(o.dout).load(tile, round, item.channels, bits[2]);
    if (o.in.z) track(o.in.z).load(tile, round, item.channels, bits[3]);
    bits[0].to_floats(o.in.u.dtype, to.u);
    bits[1].to_floats(o.in.delta.dtype, to.delta);
    bits[2].to_floats(o.dout.dtype, to.dout);
    bits[3].to_floats(o.in.z.dtype, to.z);
  }

  template <bool kWhole>
  __device__ __forceinline__ void prepare_round(const Tile32& tile, int round, Numbers& x,
                                                float* shared) const {
    float bias[kByChannel ? kTogether : 1];
    load_shared(shared + S::kBias + moves.channel_of(round, 0), bias);
#pragma unroll
    for (int e = 0; e < kTogether; ++e) x.delta[e] += bias[kByChannel ? e : 0];
    if (o.in.softplus)
#pragma unroll
      for (int e = 0; e < kTogether; ++e) x.delta[e] = softplus_fast(x.delta[e]);
    if (o.in.z)
#pragma unroll
      for (int e = 0; e < kTogether; ++e) x.dout[e] *= x.z[e] * cuda::quick_sigmoid(x.z[e]);
    auto* const cells = reinterpret_cast<float4*>(shared);
#pragma unroll
    for (int e = 0; e < kTogether; ++e) {
      const int row = tile.row(moves.slot_of(round, e));
      const bool there = kWhole || row < tile.count;
      const float dt = x.delta[e];
      cells[cell_at<S>(row, moves.channel_of(round, e))] =
          make_float4(there ? dt : 0.0F, there ? dt * x.u[e] : 0.0F, there ? x.dout[e] : 0.0F, 0.0F);
    }
  }
  template <typename T>
  __device__ __forceinline__ void prepare(const Tile32& tile, const Raw& raw, float* shared) const {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      Numbers x;
      widen<T>(raw, round, x);
      prepare_round<true>(tile, round, x, shared);
    }
  }
  __device__ __forceinline__ void prepare_any(const Tile32& tile, float* shared) const {
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      Numbers x;
      load_any(tile, round, x);
      prepare_round<false>(tile, round, x, shared);
    }
  }

  // In x.u, x.delta and x.z: what du, ddelta and dz get. Sums of dD and of ddelta_bias: of each element along
  // channels, or along time of all.
  static constexpr int kSums = kByChannel ? kTogether : 1;
  template <bool kWhole>
  __device__ __forceinline__ void finish_round(const Tile32& tile, int round, Numbers& x, float* shared,
                                               float (&skip_sums)[kSums], float (&bias_sums)[kSums]) const {
    const auto* const cells = reinterpret_cast<const float4*>(shared);
    float skips[kSums];
    float bias[kSums];
    load_shared(shared + S::kSkip + moves.channel_of(round, 0), skips);
    load_shared(shared + S::kBias + moves.channel_of(round, 0), bias);
    float4 cell[kTogether];
#pragma unroll
    for (int e = 0; e < kTogether; ++e) {
      const float4* const from =
          cells + cell_at<S>(tile.row(moves.slot_of(round, e)), moves.channel_of(round, e));
      cell[e] = *from;
      if constexpr (S::kHalves) {
        const float4 half = from[S::kStarts / 4];
        cell[e].y += half.y;
        cell[e].z += half.z;
        cell[e].w += half.w;
      }
    }
    if (o.in.z)
#pragma unroll
      for (int e = 0; e < kTogether; ++e) {
        const float out = fmaf(skips[kByChannel ? e : 0], x.u[e], cell[e].y);
        const float gate = cuda::quick_sigmoid(x.z[e]);
        const float gated = x.z[e] * gate;
        x.z[e] = x.dout[e] * out * fmaf(gated, 1.0F - gate, gate);
        x.dout[e] *= gated;
      }
#pragma unroll
    for (int e = 0; e < kTogether; ++e) x.delta[e] += bias[kByChannel ? e : 0];
    float slope[kTogether];
#pragma unroll
    for (int e = 0; e < kTogether; ++e) slope[e] = 1.0F;
    if (o.in.softplus)
#pragma unroll
      for (int e = 0; e < kTogether; ++e)
        slope[e] = x.delta[e] <= 20.0F ? cuda::quick_sigmoid(x.delta[e]) : 1.0F;
#pragma unroll
    for (int e = 0; e < kTogether; ++e) {
      const int of_sum = kByChannel ? e : 0;
      const float dy = x.dout[e];
      x.delta[e] = fmaf(cell[e].z, x.u[e], kLn2 * cell[e].w) * slope[e];
      if (kWhole ||
          (tile.row(moves.slot_of(round, e)) < tile.count && moves.channel_of(round, e) < item.channels)) {
        skip_sums[of_sum] = fmaf(dy, x.u[e], skip_sums[of_sum]);
        bias_sums[of_sum] += x.delta[e];
      }
      x.u[e] = fmaf(cell[e].z, cell[e].x, skips[of_sum] * dy);
    }
  }
  // Eight of dD and eight of ddelta_bias, those of this thread.
  __device__ __forceinline__ static float* totals(float* shared) {
    return shared + S::kTotals + static_cast<int>(threadIdx.x) * S::kTotal;
  }
  template <typename T>
  __device__ __forceinline__ void finish(const Tile32& tile, const Raw& raw, float* shared) const {
    float* const mine = totals(shared);
    float skip_sums[kSums];
    float bias_sums[kSums];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float* const at = mine + (kByChannel ? 0 : round);
      if (!kByChannel || round == 0) {
        load_shared(at, skip_sums);
        load_shared(at + 8, bias_sums);
      }
      Numbers x;
      widen<T>(raw, round, x);
      finish_round<true>(tile, round, x, shared, skip_sums, bias_sums);
      const auto put = [&](Base which, const AnyView<3>& view, const float(&from)[kTogether]) {
        if (view) narrow_track(which, view, tile).template store<T>(round, from);
      };
      put(kDu, o.du, x.u);
      put(kDdelta, o.ddelta, x.delta);
      put(kDz, o.dz, x.z);
      if (!kByChannel || round + 1 == kRounds) {
        store_packed(at, skip_sums);
        store_packed(at + 8, bias_sums);
      }
    }
  }
  __device__ __forceinline__ void finish_any(const Tile32& tile, float* shared) const {
    float* const mine = totals(shared);
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      float* const at = mine + (kByChannel ? 0 : round);
      float skip_sums[kSums];
      float bias_sums[kSums];
      load_shared(at, skip_sums);
      load_shared(at + 8, bias_sums);
      Numbers x;
      load_any(tile, round, x);
      finish_round<false>(tile, round, x, shared, skip_sums, bias_sums);
      const auto put = [&](const AnyView<3>& view, const float(&from)[kTogether]) {
        if (view) track(view).store(tile, round, item.channels, from);
      };
      put(o.du, x.u);
      put(o.ddelta, x.delta);
      put(o.dz, x.z);
      store_packed(at, skip_sums);
      store_packed(at + 8, bias_sums);
    }
  }
};

}  // namespace krait::scan
