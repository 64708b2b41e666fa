// The fast forward: real states, B and C variable. A warp walks the tokens of a tile in order, from dt and
// dt u to sums over states, and does what comes before and behind that itself: warps of a multiprocessor are
// at different places of their tiles, so that one computes while another waits.
#include <algorithm>
#include <cstdint>

#include "ops/selective_scan/cuda/channel_last.h"
#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/stage.cuh"
#include "ops/selective_scan/cuda/walk.cuh"

namespace krait::scan {
namespace {

struct Operands {
  Operands(const Problem& p, const Pieces& cut)
      : in(p),
        out(p.out),
        last_state(p.last_state),
        states(p.states),
        checkpoints(p.checkpoints ? static_cast<float*>(p.checkpoints.raw()) : nullptr),
        pieces(cut),
        by_channel(p.u.stride(1) == 1 || p.u.stride(2) != 1) {}

  Inputs<float> in;
  AnyView<3> out;
  StateView<float, 3> last_state;
  StateView<float, 4> states;
  float* checkpoints;  // (K, N, D)
  Pieces pieces;
  bool by_channel;
  // Of runs in several pieces: (piece, N, D), and (piece, D).
  const float* carried = nullptr;  // the state before each piece
  float* ends = nullptr;           // to write: the state after each piece that began with 0
  float* steps = nullptr;          // to write: the sum of dt
};

// The first pass over runs in pieces needs no end of the last one.
__device__ __forceinline__ bool skipped(const Operands& o, const Piece& piece) {
  return o.ends != nullptr && piece.last_of_run;
}

// Keeps the compiler from loading what several rounds need at once: registers would not do.
__device__ __forceinline__ void in_turn() { asm volatile("" ::: "memory"); }

// The elements of a tile that a lane brings from and to memory.
template <typename S, bool kByChannel, Pass kPass>
struct Movement {
  using Moves = MoverShare<S::kWarpChannels, kByChannel, 32>;
  using Along = Track<S::kWarpChannels, kByChannel, 32>;
  using NarrowAlong = NarrowTrack<S::kWarpChannels, kByChannel, 32>;
  using Elements = typename Along::Elements;
  static constexpr int kTogether = Moves::kTogether;
  static constexpr int kRounds = Moves::kRounds;
  using Narrow = cuda::NarrowBits<kTogether>[kRounds];

  const Operands& o;
  const Item<S>& item;
  Moves moves;
  float2* cells;      // of the warp
  float* sums;        // of the warp
  const float* bias;  // of its channels
  const float* skip;
  int channels;  // of the warp, that exist

  __device__ Movement(const Operands& operands, const Item<S>& of, float* shared)
      : o(operands),
        item(of),
        moves(static_cast<int>(threadIdx.x) % 32),
        cells(reinterpret_cast<float2*>(shared + warp() * S::kCells)),
        sums(shared + S::kFirstSums + warp() * S::kSums),
        bias(shared + S::kBias + warp() * S::kWarpChannels),
        skip(shared + S::kSkip + warp() * S::kWarpChannels) {
    const int left = item.channels - warp() * S::kWarpChannels;
    channels = left < S::kWarpChannels ? left : S::kWarpChannels;
  }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ Along track(const AnyView<3>& view) const {
    return Along(view, moves, item.piece, item.first + warp() * S::kWarpChannels);
  }
  __device__ NarrowAlong narrow_track(const AnyView<3>& view) const {
    return NarrowAlong(view, moves, item.piece, item.first + warp() * S::kWarpChannels);
  }
  template <typename F>
  __device__ __forceinline__ void each_view(F&& f) const {
    f(o.in.u);
    f(o.in.delta);
    if constexpr (kPass != Pass::states) f(o.in.z);
    if constexpr (kPass == Pass::outputs) f(o.out);
  }
  // True where whole tiles have elements side by side and aligned.
  __device__ bool packed() const {
    bool result = true;
    each_view([&](const AnyView<3>& view) { result = result && track(view).packed(item.piece, channels); });
    return result;
  }
  // True where they have one type of 16 bits too.
  __device__ bool narrow() const {
    bool result = cuda::is_narrow(o.in.u.dtype);
    each_view([&](const AnyView<3>& view) {
      result = result && NarrowAlong::fits(view) && (view.data == nullptr || view.dtype == o.in.u.dtype);
    });
    return result;
  }
  __device__ __forceinline__ void prefetch(const Tile32& tile) const {
    each_view([&](const AnyView<3>& view) {
      if (view.data == nullptr || view.data == o.out.data) return;
      const Along from = track(view);
#pragma unroll
      for (int round = 0; round < kRounds; ++round) from.prefetch(tile, round);
    });
  }

  // dt and dt u of a round.
  template <bool kWhole>
  __device__ __forceinline__ void put(const Tile32& tile, int round, float (&x)[kTogether],
                                      float (&dt)[kTogether]) const {
    float of_channel[kByChannel ? kTogether : 1];
    load_shared(bias + moves.channel_of(round, 0), of_channel);
#pragma unroll
    for (int e = 0; e < kTogether; ++e) dt[e] += of_channel[kByChannel ? e : 0];
    if (o.in.softplus)
#pragma unroll
      for (int e = 0; e < kTogether; ++e) dt[e] = softplus_fast(dt[e]);
#pragma unroll
    for (int e = 0; e < kTogether; ++e) {
      // Empty rows leave the state as it is.
      const bool there = kWhole || tile.row(moves.slot_of(round, e)) < tile.count;
      x[e] = there ? (kPass == Pass::gradients ? x[e] : dt[e] * x[e]) : 0.0F;
      dt[e] = there ? dt[e] : 0.0F;
    }
    if constexpr (kByChannel && kTogether % 2 == 0) {
      float4* const to =
          reinterpret_cast<float4*>(&cells[tile.row(moves.slot_of(round, 0)) * S::kRow + moves.channel]);
#pragma unroll
      for (int e = 0; e < kTogether; e += 2) to[e / 2] = make_float4(dt[e], x[e], dt[e + 1], x[e + 1]);
    } else {
#pragma unroll
      for (int e = 0; e < kTogether; ++e)
        cells[tile.row(moves.slot_of(round, e)) * S::kRow + moves.channel_of(round, e)] =
            make_float2(dt[e], x[e]);
    }
  }
  __device__ __forceinline__ void gate(float (&x)[kTogether], const float (&z)[kTogether]) const {
    if (o.in.z)
#pragma unroll
      for (int e = 0; e < kTogether; ++e) x[e] *= z[e] * cuda::quick_sigmoid(z[e]);
  }
  template <typename T>
  __device__ __forceinline__ void prepare(const Tile32& tile, const Narrow& u_bits, const Narrow& delta_bits,
                                          const Narrow& z_bits) const {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float x[kTogether];
      float dt[kTogether];
      u_bits[round].template to_floats<T>(x);
      delta_bits[round].template to_floats<T>(dt);
      if constexpr (kPass == Pass::gradients) {
        float of_gate[kTogether];
        z_bits[round].template to_floats<T>(of_gate);
        gate(x, of_gate);
      }
      put<true>(tile, round, x, dt);
      in_turn();
    }
  }
  __device__ __forceinline__ void prepare_any(const Tile32& tile) const {
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      Elements u_bits;
      Elements delta_bits;
      track(o.in.u).load(tile, round, channels, u_bits);
      track(o.in.delta).load(tile, round, channels, delta_bits);
      float x[kTogether];
      float dt[kTogether];
      u_bits.to_floats(o.in.u.dtype, x);
      delta_bits.to_floats(o.in.delta.dtype, dt);
      if constexpr (kPass == Pass::gradients) {
        Elements z_bits = {};
        if (o.in.z) track(o.in.z).load(tile, round, channels, z_bits);
        float of_gate[kTogether];
        z_bits.to_floats(o.in.z.dtype, of_gate);
        gate(x, of_gate);
      }
      put<false>(tile, round, x, dt);
    }
  }

  __device__ __forceinline__ float sum_of(int row, int channel) const {
    float sum = 0.0F;
    if constexpr (S::kApart) {
#pragma unroll
      for (int i = 0; i < S::kLanes; i += 4) {
        const auto some = *reinterpret_cast<const float4*>(sums + sum_at(row, channel * S::kLanes + i));
        sum += some.x + some.y + some.z + some.w;
      }
    } else {
      sum = cells[row * S::kRow + channel].x;
    }
    return sum;
  }
  // From u (x) and the sums over states to outputs.
  __device__ __forceinline__ void take(const Tile32& tile, int round, float (&x)[kTogether],
                                       const float (&of_gate)[kTogether]) const {
    float of_channel[kByChannel ? kTogether : 1];
    load_shared(skip + moves.channel_of(round, 0), of_channel);
    if constexpr (!S::kApart && kByChannel) {
      const float4* const from = reinterpret_cast<const float4*>(
          &cells[tile.row(moves.slot_of(round, 0)) * S::kRow + moves.channel]);
#pragma unroll
      for (int e = 0; e < kTogether; e += 2) {
        const float4 two = from[e / 2];
        x[e] = fmaf(of_channel[e], x[e], two.x);
        x[e + 1] = fmaf(of_channel[e + 1], x[e + 1], two.z);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kTogether; ++e)
        x[e] = fmaf(of_channel[kByChannel ? e : 0], x[e],
                    sum_of(tile.row(moves.slot_of(round, e)), moves.channel_of(round, e)));
    }
    gate(x, of_gate);
  }
  template <typename T>
  __device__ __forceinline__ void finish(const Tile32& tile, const Narrow& u_bits, const Narrow& z_bits,
                                         const NarrowAlong& out) const {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float x[kTogether];
      float of_gate[kTogether];
      u_bits[round].template to_floats<T>(x);
      z_bits[round].template to_floats<T>(of_gate);
      take(tile, round, x, of_gate);
      out.template store<T>(round, x);
      in_turn();
    }
  }
  __device__ __forceinline__ void finish_any(const Tile32& tile) const {
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      Elements u_bits;
      Elements z_bits = {};
      track(o.in.u).load(tile, round, channels, u_bits);
      if (o.in.z) track(o.in.z).load(tile, round, channels, z_bits);
      float x[kTogether];
      float of_gate[kTogether];
      u_bits.to_floats(o.in.u.dtype, x);
      z_bits.to_floats(o.in.z.dtype, of_gate);
      take(tile, round, x, of_gate);
      track(o.out).store(tile, round, channels, x);
    }
  }
};

template <typename S, bool kByChannel, Pass kPass>
__global__ void __launch_bounds__(kWalkers, S::kResident) scan_tiles(Operands o) {
  using Move = Movement<S, kByChannel, kPass>;
  using BAndC = Factors<S::kAll>;
  constexpr int kRounds = Move::kRounds;
  constexpr int kPerTeam = S::kPerTeam;
  extern __shared__ __align__(16) float shared[];
  const Inputs<float>& in = o.in;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % S::kLanes;
  const int d_state = static_cast<int>(in.d_state);

  for (std::int64_t i = blockIdx.x; i < Item<S>::count(in, o.pieces); i += gridDim.x) {
    const Item<S> item(in, o.pieces, i);
    if (skipped(o, item.piece)) continue;
    const Piece& piece = item.piece;
    // f(channel, state, c, k) for those of this thread that exist.
    const auto each_state = [&](auto&& f) {
#pragma unroll
      for (int c = 0; c < kPerTeam; ++c) {
        const int channel = thread / S::kLanes * kPerTeam + (c ^ (lane % kPerTeam));
#pragma unroll
        for (int k = 0; k < S::kStates; ++k)
          if (const int n = lane * S::kStates + k; channel < item.channels && n < d_state)
            f(item.first + channel, n, c, k);
      }
    };
    States<S> states = {};
    each_state([&](std::int64_t d, int n, int c, int k) {
      states.A[c][k] = kLog2E * in.A.get(d, n);
      if (piece.part > 0 && o.carried != nullptr)
        states.h[c][k] = o.carried[(item.piece_index * d_state + n) * in.channels + d];
      else if (o.ends == nullptr)
        states.h[c][k] = in.state_before(piece, d, n);
    });

    std::int64_t request = piece.requests_begin;
    const auto keep_states = [&](std::int64_t tokens) {
      if (o.checkpoints != nullptr && piece.has_checkpoint_after(tokens)) {
        const std::int64_t at = piece.checkpoint + tokens / kCheckpointSteps - 1;
        each_state([&](std::int64_t d, int n, int c, int k) {
          o.checkpoints[(at * d_state + n) * in.channels + d] = states.h[c][k];
        });
      }
      if constexpr (!kNoOutputs<kPass>) {
        for (; request < piece.requests_end && o.pieces.requests[request].count == tokens; ++request) {
          const StateRequest& wanted = o.pieces.requests[request];
          each_state([&](std::int64_t d, int n, int c, int k) {
            o.states.set(states.h[c][k], wanted.row, wanted.slot, d, n);
          });
        }
      }
    };
    keep_states(0);

    __syncthreads();  // all that the item before left has been read
    if (thread < S::kChannels) {
      const bool mine = thread < item.channels;
      shared[S::kBias + thread] = in.delta_bias && mine ? in.delta_bias.load(item.first + thread) : 0.0F;
      shared[S::kSkip + thread] = !kNoOutputs<kPass> && in.D && mine ? in.D.load(item.first + thread) : 0.0F;
    }
    __syncthreads();

    const Move move(o, item, shared);
    const BAndC factors = {in.B.variable, in.C.variable, piece.row, item.group, d_state};
    const bool packed = move.packed();
    const bool narrow = packed && move.narrow();
    const bool narrow_factors = BAndC::kRounds == 1 && factors.packed(piece);
    // Of 16-bit tensors a tile is on its way to registers while the one before is walked.
    typename Move::NarrowAlong u_track = move.narrow_track(in.u);
    typename Move::NarrowAlong delta_track = move.narrow_track(in.delta);
    typename Move::NarrowAlong z_track;
    typename Move::NarrowAlong out_track;
    if constexpr (kPass != Pass::states) z_track = move.narrow_track(in.z);
    if constexpr (kPass == Pass::outputs) out_track = move.narrow_track(o.out);
    typename Move::Narrow u;
    typename Move::Narrow delta;
    typename Move::Narrow z;
    typename BAndC::Narrow factor;
    if (narrow_factors) factor = factors.first(piece, thread);
    const auto ask = [&](int count) {
      if (count != kTile) return;
      if (narrow_factors) factor.load();
      if (!narrow) return;
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        u_track.load(round, u[round]);
        delta_track.load(round, delta[round]);
        if (kPass == Pass::gradients && in.z) z_track.load(round, z[round]);
      }
    };

    TileCursor here(o.pieces, piece, !kNoOutputs<kPass>);
    ask(here.count);
    for (int buffer = 0; here.count > 0; buffer ^= 1) {
      const Tile32 tile(o.pieces, piece, here.begin, here.count);
      const bool whole = here.count == kTile;
      float* const b_and_c = shared + S::kFactors + buffer * BAndC::kFloats;
      if (narrow_factors && whole) {
        with_narrow(in.B.variable.dtype,
                    [&](auto t) { factors.template store<decltype(t)>(tile, thread, factor, b_and_c); });
      } else {
#pragma unroll 1
        for (int round = 0; round < BAndC::kRounds; ++round) {
          typename BAndC::Elements elements;
          factors.load(tile, thread, round, elements);
          factors.store(tile, thread, round, elements, b_and_c);
        }
      }
      typename Move::Narrow u_here;
      if (narrow && whole) {
        with_narrow(in.u.dtype, [&](auto t) { move.template prepare<decltype(t)>(tile, u, delta, z); });
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
          u_here[round] = u[round];
          if (kPass == Pass::outputs && in.z) z_track.load(round, z[round]);
        }
      } else {
        move.prepare_any(tile);
      }
      TileCursor next = here;
      next.advance(o.pieces, piece);
      u_track.advance(here.count);
      delta_track.advance(here.count);
      if constexpr (kPass == Pass::gradients) z_track.advance(here.count);
      factor.advance(here.count);
      ask(next.count);
      if (!narrow && packed && next.count == kTile)
        move.prefetch(Tile32(o.pieces, piece, next.begin, next.count));
      __syncthreads();  // B and C are there, and dt and dt u
      if constexpr (S::kApart)
        walk_apart<S, kPass>(move.cells, b_and_c, move.sums, here.count, states);
      else
        walk_together<S, kPass>(move.cells, b_and_c, here.count, states);
      __syncwarp();  // the cells have been read, sums are there
      if constexpr (!kNoOutputs<kPass>) {
        if (narrow && whole)
          with_narrow(in.u.dtype,
                      [&](auto t) { move.template finish<decltype(t)>(tile, u_here, z, out_track); });
        else
          move.finish_any(tile);
        z_track.advance(here.count);
        out_track.advance(here.count);
      }
      here = next;
      keep_states(here.begin);
    }

    each_state([&](std::int64_t d, int n, int c, int k) {
      if (o.ends != nullptr)
        o.ends[(item.piece_index * d_state + n) * in.channels + d] = states.h[c][k];
      else if (!kNoOutputs<kPass> && o.last_state && piece.last)
        o.last_state.set(states.h[c][k], piece.sequence, d, n);
      if (o.steps != nullptr && n == 0) o.steps[item.piece_index * in.channels + d] = states.steps[c];
    });
  }
}

// From the state after each piece alone to the state before each piece of a run, in place.
__global__ void __launch_bounds__(kWalkers)
    carry_states(Inputs<float> in, Pieces pieces, const float* steps, float* states) {
  const std::int64_t size = in.d_state * in.channels;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kWalkers + threadIdx.x; i < pieces.count * size;
       i += std::int64_t{gridDim.x} * kWalkers) {
    std::int64_t at = i / size;
    Piece piece = pieces.at(at);
    if (piece.part != 0) continue;
    const std::int64_t d = i % in.channels;
    const std::int64_t n = i / in.channels % in.d_state;
    const float A = kLog2E * in.A.get(d, n);
    float h = in.state_before(piece, d, n);
    for (; !piece.last_of_run; piece = pieces.at(++at)) {
      float& state = states[(at * in.d_state + n) * in.channels + d];
      const float end = fmaf(exp2_fast(steps[at * in.channels + d] * A), h, state);
      state = h;
      h = end;
    }
    states[(at * in.d_state + n) * in.channels + d] = h;
  }
}

template <typename S, Pass kPass>
void launch_tiles(Context& ctx, const Operands& o) {
  const std::int64_t in_group = o.in.channels / o.in.groups;
  const std::int64_t items = o.pieces.count * o.in.groups * ((in_group + S::kChannels - 1) / S::kChannels);
  cuda::launch(ctx, kPass == Pass::outputs ? "selective_scan" : "selective_scan_states",
               o.by_channel ? scan_tiles<S, true, kPass> : scan_tiles<S, false, kPass>,
               dim3(static_cast<unsigned>(std::min<std::int64_t>(items, 1 << 30))), dim3(kWalkers),
               sizeof(float) * S::kFloats, o);
}

// f of the shape that a plan means, of at most 16 states and of more.
template <typename F>
auto with_few_states(const LanePlan& plan, F&& f) {
  if (plan.per_team == 4) return f(Shape<4, 4, 4, 2>());
  return plan.resident > 2 ? f(Shape<4, 4, 1, 4>()) : f(Shape<4, 4, 1, 2>());
}
template <typename F>
auto with_shape(const LanePlan& plan, F&& f) {
  switch (plan.lanes) {
    case 4: return with_few_states(plan, f);
    case 8: return plan.states == 2 ? f(Shape<4, 4, 1, 2>()) : f(Shape<8, 4, 1, 4>());
    case 16: return f(Shape<16, 4, 1, 4>());
    default: return f(Shape<32, 8, 1, 2>());
  }
}

template <Pass kPass>
void launch_tiles(Context& ctx, const Operands& o, const LanePlan& plan) {
  const auto launch = [&](auto shape) { launch_tiles<decltype(shape), kPass>(ctx, o); };
  if constexpr (kPass == Pass::gradients)
    with_few_states(plan, launch);
  else
    with_shape(plan, launch);
}

// The state before each piece of all but the last of their runs.
template <Pass kPass>
Tensor carry(Context& ctx, Operands o, const LanePlan& plan) {
  const Pieces& pieces = o.pieces;
  const Tensor states = ctx.empty({pieces.count, o.in.d_state, o.in.channels});
  const Tensor steps = ctx.empty({pieces.count, o.in.channels});
  o.checkpoints = nullptr;
  o.ends = static_cast<float*>(states.raw());
  o.steps = static_cast<float*>(steps.raw());
  launch_tiles<kPass>(ctx, o, plan);
  cuda::launch(ctx, "selective_scan_carry", carry_states,
               dim3(cuda::blocks_for(ctx, pieces.count * o.in.d_state * o.in.channels, kWalkers)),
               dim3(kWalkers), 0, o.in, pieces, static_cast<const float*>(steps.raw()),
               static_cast<float*>(states.raw()));
  return states;
}

bool fits(const Context& ctx, const LanePlan& plan) {
  const std::size_t shared =
      with_shape(plan, [](auto shape) { return sizeof(float) * decltype(shape)::kFloats; });
  return shared <= static_cast<std::size_t>(cuda::limits_of(ctx).shared_memory_per_block);
}

}  // namespace

Tensor gradients_between(Context& ctx, const Problem& problem, const Gradients& gradients,
                         std::int64_t length) {
  Problem p = problem;
  p.u = gradients.dout;
  p.B = problem.C;
  p.initial_state = gradients.dlast_state;
  p.reverse = !problem.reverse;
  p.out = p.last_state = p.states = p.checkpoints = {};
  const UploadedPieces uploaded = upload_pieces(ctx, p, length);
  const LanePlan plan = choose_forward(uploaded.pieces.count, p.groups, p.channels / p.groups, length,
                                       p.d_state, false, cuda::limits_of(ctx).multiprocessors);
  return carry<Pass::gradients>(ctx, Operands(p, uploaded.pieces), plan);
}

bool run_fast_forward(Context& ctx, const Problem& p) {
  if (!fits_tiles(p)) return false;
  const bool channel_last = fits_channel_last(p);
  const LanePlan plan = choose_forward(std::ssize(p.runs.runs), p.groups, p.channels / p.groups, p.u.size(2),
                                       p.d_state, channel_last, cuda::limits_of(ctx).multiprocessors);
  if (!fits(ctx, plan)) return false;
  const UploadedPieces uploaded = upload_pieces(ctx, p, plan.piece);
  const Pieces& pieces = uploaded.pieces;
  if (pieces.count * p.channels == 0) return true;
  Operands o(p, pieces);
  Tensor carried;
  if (pieces.count > std::ssize(p.runs.runs)) {
    carried = carry<Pass::states>(ctx, o, plan);
    o.carried = static_cast<const float*>(carried.raw());
  }
  if (channel_last && run_channel_last(ctx, p, pieces, plan, o.carried)) return true;
  p.out ? launch_tiles<Pass::outputs>(ctx, o, plan) : launch_tiles<Pass::states>(ctx, o, plan);
  return true;
}

}  // namespace krait::scan
