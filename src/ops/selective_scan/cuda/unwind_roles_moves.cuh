// What the moving warps of unwind_roles.cu bring from and to memory: elements and gradients of a sub, and the
// sums for B and C.
#pragma once

#include <cstdint>

#include "core/cuda/wgmma.cuh"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/raw.cuh"
#include "ops/selective_scan/cuda/unwind_moves.cuh"
#include "ops/selective_scan/cuda/unwind_roles.cuh"

namespace krait::scan::roles {

// The tensors that movers read and write.
enum Which { kU, kDelta, kDout, kZ, kDu, kDdelta, kDz, kTensors };

struct Operands : UnwindOperands {
  explicit Operands(const UnwindOperands& o) : UnwindOperands(o) {
    const AnyView<3>* const views[] = {&in.u, &in.delta, &dout, &in.z, &du, &ddelta, &dz};
    for (int i = 0; i < kTensors; ++i)
      token_bytes[i] = static_cast<int>(views[i]->stride[2]) * (views[i]->dtype == DType::f32 ? 4 : 2) *
                       (pieces.reverse ? -1 : 1);
  }
  int token_bytes[kTensors];  // from token to token of the walk
};

#ifdef KRAIT_WGMMA

__device__ __forceinline__ float4 plus(float4 a, const float (&b)[4]) {
  return make_float4(a.x + b[0], a.y + b[1], a.z + b[2], a.w + b[3]);
}

// What a lane brings from and to memory: four channels of a token of each sub that its warp has.
template <typename T>
struct Mover {
  // Elements of a sub as they come from memory.
  struct Elements {
    Raw<T> u;
    Raw<T> delta;
    Raw<T> dout;
    Raw<T> z;
  };

  char* at[kTensors];  // the lane's elements at the piece's first token
  int count;           // tokens of the piece; 0 where the channels do not exist
  int cell[4];         // of slot 0, from the beginning of shared memory
  int parameters;      // bias and skip of the channels
  int totals;          // what the lane has summed of dD and ddelta_bias

  __device__ Mover(const Operands& o, const Piece& piece, std::int64_t channel, bool exists, int lane,
                   int group, int thread)
      : count(exists ? static_cast<int>(piece.count) : 0),
        parameters(kParameters +
                   (group * kGroup * kWarpChannels + lane % 8 * 4) * static_cast<int>(sizeof(float))),
        totals(kTotals + thread * kTotal) {
    const AnyView<3>* const views[] = {&o.in.u, &o.in.delta, &o.dout, &o.in.z, &o.du, &o.ddelta, &o.dz};
#pragma unroll
    for (int i = 0; i < kTensors; ++i) {
      const AnyView<3>& view = *views[i];
      at[i] =
          static_cast<char*>(view.data) +
          (piece.row * view.stride[0] + channel + piece.start * view.stride[2]) * static_cast<int>(sizeof(T));
      asm volatile("" : "+l"(at[i]));  // as one number, not as sums that are made anew
    }
    const int unwinder = group * kGroup + lane % 8 / 4;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      cell[e] = unwinder * kWarpSlots + lane / 8 * kCellRow + place_of(lane % 4 * 4 + e, unwinder) * kCell;
  }

  __device__ __forceinline__ char* place(const Operands& o, Which which, int token) const {
    char* const result = at[which] + std::int64_t{token} * o.token_bytes[which];
    __builtin_assume(__isGlobal(result));
    return result;
  }
  __device__ __forceinline__ void ask(const Operands& o, int token, Elements& to) const {
    // No step: softplus makes 0 of it.
    to.u.fill(0);
    to.delta.fill(kMinusInfinity<T>);
    to.dout.fill(0);
    to.z.fill(0);
    if (token >= count) return;
    // In the first-level cache they would drive out what registers have no room for.
    to.u.load_past_cache(place(o, kU, token));
    to.delta.load_past_cache(place(o, kDelta, token));
    to.dout.load_past_cache(place(o, kDout, token));
    to.z.load_past_cache(place(o, kZ, token));
  }

  // dt, dt u and dy.
  __device__ __forceinline__ void prepare(const Elements& from, char* shared, int slot) const {
    float bias[4];
    load_shared(reinterpret_cast<const float*>(shared + parameters), bias);
    float x[4];
    float dt[4];
    float dy[4];
    float gate[4];
    from.z.to_floats(gate);
    from.delta.to_floats(dt);
    from.u.to_floats(x);
    from.dout.to_floats(dy);
#pragma unroll
    for (int e = 0; e < 4; ++e) dt[e] = softplus_fast(dt[e] + bias[e]);
#pragma unroll
    for (int e = 0; e < 4; ++e) dy[e] *= gate[e] * cuda::quick_sigmoid(gate[e]);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      *reinterpret_cast<float4*>(shared + slot * kSlot + cell[e]) =
          make_float4(dt[e], dt[e] * x[e], dy[e], 0.0F);
  }

  __device__ __forceinline__ void finish(const Operands& o, int token, const Elements& from, char* shared,
                                         int slot) const {
    float bias[4];
    float skip[4];
    load_shared(reinterpret_cast<const float*>(shared + parameters), bias);
    load_shared(reinterpret_cast<const float*>(shared + parameters) + Shape::kChannels, skip);
    float x[4];
    float before[4];
    float dy[4];
    float gate[4];
    from.z.to_floats(gate);
    from.delta.to_floats(before);
    from.u.to_floats(x);
    from.dout.to_floats(dy);
    float gained[4];  // of dD
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const auto lower = *reinterpret_cast<const float4*>(shared + slot * kSlot + cell[e]);
      const auto upper = *reinterpret_cast<const float4*>(shared + slot * kSlot + cell[e] + kStarts);
      const float out = fmaf(skip[e], x[e], lower.y + upper.y);
      const float dinput = lower.z + upper.z;
      const float sigmoid = cuda::quick_sigmoid(gate[e]);
      // Softplus is the identity above 20, where this is 1.
      const float slope = cuda::quick_sigmoid(before[e] + bias[e]);
      const float gated = gate[e] * sigmoid;
      gate[e] = dy[e] * out * fmaf(gated, 1.0F - sigmoid, sigmoid);
      dy[e] *= gated;
      before[e] = fmaf(dinput, x[e], kLn2 * (lower.w + upper.w)) * slope;
      gained[e] = dy[e] * x[e];
      x[e] = fmaf(dinput, lower.x, skip[e] * dy[e]);
    }
    if (token >= count) return;
    auto* const sums = reinterpret_cast<float4*>(shared + totals);
    sums[0] = plus(sums[0], gained);
    sums[1] = plus(sums[1], before);
    store_packed(reinterpret_cast<T*>(place(o, kDu, token)), x);
    store_packed(reinterpret_cast<T*>(place(o, kDdelta, token)), before);
    store_packed(reinterpret_cast<T*>(place(o, kDz, token)), gate);
  }
};

// What the warps have summed for B and C at tokens from `begin` on, as many as are unwound between two
// meetings, warp after warp.
__device__ __forceinline__ void flush(const Operands& o, const Item<Shape>& item, int begin,
                                      const char* partials, int thread) {
  static_assert(kTile / kParts * kPartialToken / 16 == kMovers);
  const Piece& piece = item.piece;
  const auto d_state = static_cast<int>(o.in.d_state);
  const bool is_c = thread / (kAll / 4) % 2 != 0;
  const int n = thread % (kAll / 4) * 4;
  float* const all = is_c ? o.dC : o.dB;
  if (all == nullptr || n >= d_state) return;
  const std::int64_t apart = o.in.groups * d_state;
  float* const sums =
      all + (item.block * o.in.rows + piece.row) * o.length * apart + item.group * d_state + n;
  const int at = begin + thread / (2 * kAll / 4);
  if (at >= piece.count) return;
  const auto* const from = reinterpret_cast<const float4*>(partials) + thread;
  float4 sum = *from;
#pragma unroll
  for (int warp = 1; warp < kUnwindingWarps; ++warp) {
    const float4 more = from[warp * kPartialWarp / 16];
    sum.x += more.x;
    sum.y += more.y;
    sum.z += more.z;
    sum.w += more.w;
  }
  float* const to = sums + (piece.start + at * piece.step) * apart;
  if (d_state % 4 == 0) {
    *reinterpret_cast<float4*>(to) = sum;
  } else {
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (n + j < d_state) to[j] = values[j];
  }
}

#endif

}  // namespace krait::scan::roles
