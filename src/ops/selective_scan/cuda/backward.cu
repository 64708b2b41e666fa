// The fast backward. As in the forward, a team of lanes shares a channel or some. A tile of kTile tokens is
// walked forward from its checkpoint, keeping the state before each kSub tokens; these are then unwound from
// the last to the first, decays and states of kSub tokens in registers. What B and C get is summed over the
// channels of a thread, of a warp, and in shared memory of the block.
#include <algorithm>
#include <cstdint>

#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/unwind.cuh"
#include "ops/selective_scan/cuda/unwind_moves.cuh"
#include "ops/selective_scan/cuda/unwind_roles.h"

namespace krait::scan {
namespace {

// The item that a block takes. Where pieces are walked in turn, it is the next one that no block has, the
// last pieces of all rows first: the item that it waits for was then taken earlier, by a block that is at
// work.
template <typename S>
struct Turn {
  std::int64_t item;
  std::int64_t chain = 0;  // of a row and a block of channels

  __device__ Turn(const UnwindOperands& o, std::int64_t i, int* shared) : item(i) {
    if (o.handed == nullptr) return;
    if (threadIdx.x == 0) *shared = atomicAdd(o.turns, 1);
    __syncthreads();
    const std::int64_t blocks = Item<S>::blocks(o.in) * o.in.groups;
    const std::int64_t chains = o.in.rows * blocks;
    const std::int64_t next = *shared;
    const std::int64_t before = next / chains;  // pieces of the row
    chain = next % chains;
    item = (chain / blocks * o.pieces.parts + o.pieces.parts - 1 - before) * blocks + chain % blocks;
    if (threadIdx.x == 0) {
      while (atomicAdd(o.turns + 1 + chain, 0) < before) {
      }
      __threadfence();
    }
    __syncthreads();
  }
  // All threads have written what they hand on.
  __device__ void done(const UnwindOperands& o) const {
    if (o.handed != nullptr && threadIdx.x == 0) atomicAdd(o.turns + 1 + chain, 1);
  }
};

template <typename S, bool kByChannel>
__global__ void __launch_bounds__(kWalkers, S::kStates == 8    ? 1
                                            : S::kPerTeam == 2 ? 2
                                                               : 3) unwind_tiles(UnwindOperands o) {
  using Move = UnwindMovement<S, kByChannel>;
  using Moves = typename Move::Moves;
  using BAndC = typename S::BAndC;
  extern __shared__ __align__(16) float shared[];
  const Inputs<float>& in = o.in;
  const int mover = static_cast<int>(threadIdx.x);
  const Moves moves(mover);
  const int lane = mover % S::kLanes;
  const int team = mover / S::kLanes;
  const int d_state = static_cast<int>(in.d_state);

  for (std::int64_t i = blockIdx.x; i < Item<S>::count(in, o.pieces); i += gridDim.x) {
    const Turn<S> turn(o, i, reinterpret_cast<int*>(shared + S::kTicket));
    const Item<S> item(in, o.pieces, turn.item);
    const Piece& piece = item.piece;
    // f(channel, state, c, k) for those of this thread that exist.
    const auto each_state = [&](auto&& f) {
#pragma unroll
      for (int c = 0; c < S::kPerTeam; ++c) {
        const int channel = team * S::kPerTeam + (c ^ (lane % S::kPerTeam));
#pragma unroll
        for (int k = 0; k < S::kStates; ++k)
          if (const int n = lane * S::kStates + (k ^ S::order()); channel < item.channels && n < d_state)
            f(item.first + channel, n, c, k);
      }
    };
    Carried<S> carried = {};
    each_state([&](std::int64_t d, int n, int c, int k) {
      carried.A[c][k] = kLog2E * static_cast<const float*>(in.A.data)[in.A.offset(d, n)];
      if (o.handed != nullptr && !piece.last) {
        carried.g[c][k] = __ldcg(o.handed + (piece.row * d_state + n) * in.channels + d);
      } else if (o.carried != nullptr) {
        const std::int64_t from_last = piece.row * o.pieces.parts + o.pieces.parts - 1 - piece.part;
        carried.g[c][k] = o.carried[(from_last * d_state + n) * in.channels + d];
      } else if (piece.last && o.dlast_state) {
        carried.g[c][k] = o.dlast_state.get(piece.sequence, d, n);
      }
    });
    Move move(o, item, moves, shared);
    __syncthreads();  // the sums of the item before have been read
    auto* const bases = reinterpret_cast<std::int64_t*>(shared + S::kBases);
    const auto put_base = [&](Base which, const AnyView<3>& view) {
      if (mover == which) bases[which] = piece.row * view.stride[0] + item.first * view.stride[1];
    };
    put_base(kU, in.u);
    put_base(kDelta, in.delta);
    put_base(kDout, o.dout);
    put_base(kZ, in.z);
    put_base(kDu, o.du);
    put_base(kDdelta, o.ddelta);
    put_base(kDz, o.dz);
    if (mover == kTokenSums)
      bases[kTokenSums] = ((item.block * in.rows + piece.row) * o.length * in.groups + item.group) * d_state;
#pragma unroll
    for (int e = 0; e < 16; ++e) Move::totals(shared)[e] = 0.0F;
    if (mover < S::kChannels) {
      const bool mine = mover < item.channels;
      shared[S::kBias + mover] = in.delta_bias && mine ? in.delta_bias.load(item.first + mover) : 0.0F;
      shared[S::kSkip + mover] = in.D && mine ? in.D.load(item.first + mover) : 0.0F;
    }
    __syncthreads();
    const BAndC factors = {in.B.variable, in.C.variable, piece.row, item.group, d_state};
    const bool narrow_factors = BAndC::kRounds == 1 && factors.packed(piece);

    float h[S::kPerTeam][S::kStates] = {};  // before the tile
    typename Move::Raw raw;
    typename BAndC::Narrow factor;
    if (narrow_factors) factor = factors.first(piece, mover);
    const bool full = item.channels == S::kChannels && d_state == S::kAll && in.channels < 1 << 24;
    // What the tile at `begin` needs of memory.
    const auto ask_state = [&](std::int64_t begin) {
      if (begin == 0 && piece.part == 0) {
        each_state([&](std::int64_t d, int n, int c, int k) { h[c][k] = in.state_before(piece, d, n); });
        return;
      }
      const float* const from = o.checkpoints + (piece.checkpoint + begin / kTile - 1) * o.checkpoint_size;
      if (!full) {
        each_state([&](std::int64_t d, int n, int c, int k) { h[c][k] = from[n * in.channels + d]; });
        return;
      }
      const auto channels = static_cast<int>(in.channels);
      const float* const mine = from + item.first + (lane * S::kStates * channels + team * S::kPerTeam);
#pragma unroll
      for (int c = 0; c < S::kPerTeam; ++c)
#pragma unroll
        for (int k = 0; k < S::kStates; ++k)
          h[c][k] = mine[(k ^ S::order()) * channels + (c ^ (lane % S::kPerTeam))];
    };
    const auto ask_elements = [&](std::int64_t begin, int count) {
      if (count != kTile) return;
      if (move.narrow) move.load(Tile32(o.pieces, piece, begin, count), raw);
      if (narrow_factors) factor.load(begin);
    };
    std::int64_t begin = piece.count == 0 ? -1 : (piece.count - 1) / kTile * kTile;
    int count = static_cast<int>(piece.count - begin);
    if (begin >= 0) {
      ask_elements(begin, count);
      ask_state(begin);
    }
    for (; begin >= 0; begin -= kTile, count = kTile) {
      const Tile32 tile(o.pieces, piece, begin, count);
      const bool whole = move.narrow && count == kTile;
      if (narrow_factors && count == kTile) {
        with_narrow(in.B.variable.dtype, [&](auto t) {
          factors.template store<decltype(t)>(tile, mover, factor, shared + S::kFactors);
        });
      } else {
#pragma unroll 1
        for (int round = 0; round < BAndC::kRounds; ++round) {
          typename BAndC::Elements elements;
          factors.load(tile, mover, round, elements);
          factors.store(tile, mover, round, elements, shared + S::kFactors);
        }
      }
      move.moves.forget();
      if (whole)
        with_narrow(in.u.dtype, [&](auto t) { move.template prepare<decltype(t)>(tile, raw, shared); });
      else
        move.prepare_any(tile, shared);
      if (begin > 0 && !move.narrow) move.prefetch(Tile32(o.pieces, piece, begin - kTile, kTile));
      __syncthreads();

      const int subs = (count + S::kSub - 1) / S::kSub;
      walk_tile<S>(shared, subs, carried.A, h);
      unwind_tile<S>(shared, subs, carried, [&](int sub) {
        if (S::kFlush == kTile || sub * S::kSub % S::kFlush != 0) return;
        __syncthreads();
        flush<S>(o, shared, tile, sub * S::kSub);
        if (sub > 0) __syncthreads();  // the next ones take their place
      });
      // The elements again, which had no room in registers, and those of the next tile: on their way while
      // what can be done without them is.
      const auto flush_tile = [&] {
        if constexpr (S::kFlush == kTile) flush<S>(o, shared, tile, 0);
      };
      if constexpr (S::kFlush == kTile) __syncthreads();
      move.moves.forget();
      if (whole) {
        typename Move::Raw again;
        move.load(tile, again);
        flush_tile();
        if (begin > 0) ask_elements(begin - kTile, kTile);
        with_narrow(in.u.dtype, [&](auto t) { move.template finish<decltype(t)>(tile, again, shared); });
      } else {
        flush_tile();
        move.finish_any(tile, shared);
        if (begin > 0) ask_elements(begin - kTile, kTile);
      }
      if (begin > 0) ask_state(begin - kTile);
    }

    each_state([&](std::int64_t d, int n, int c, int k) {
      if (o.dA != nullptr) o.dA[(item.piece_index * d_state + n) * in.channels + d] = carried.dA[c][k];
      if (o.dinitial_state && piece.first) o.dinitial_state.set(carried.g[c][k], piece.sequence, d, n);
      if (o.handed != nullptr && !piece.first)
        o.handed[(piece.row * d_state + n) * in.channels + d] = carried.g[c][k];
    });
    if (o.handed != nullptr) __threadfence();
    __syncthreads();
    turn.done(o);
    // The threads that have elements of a channel, one after the other.
    for (int which = 0; which < 2; ++which) {
      float* const to = which == 0 ? o.dD : o.ddelta_bias;
      if (to == nullptr || mover >= item.channels) continue;
      const float* const from = shared + S::kTotals + which * 8;
      float sum = 0.0F;
      if constexpr (kByChannel) {
        constexpr int kApart = S::kChannels / Moves::kTogether;
        const float* const mine = from + mover % Moves::kTogether + mover / Moves::kTogether * S::kTotal;
        for (int other = 0; other < kMovers; other += kApart) sum += mine[other * S::kTotal];
      } else {
        for (int other = 0; other < kMovers; ++other)
          if (Moves(other).channel == mover % Moves::kAcross)
            sum += from[mover / Moves::kAcross + other * S::kTotal];
      }
      to[item.piece_index * in.channels + item.first + mover] = sum;
    }
  }
}

template <typename S>
void launch_tiles(Context& ctx, const UnwindOperands& o) {
  const std::int64_t blocks = (o.in.channels / o.in.groups + S::kChannels - 1) / S::kChannels;
  const std::int64_t items = o.pieces.count * o.in.groups * blocks;
  cuda::launch(ctx, "selective_scan_backward", o.by_channel ? unwind_tiles<S, true> : unwind_tiles<S, false>,
               dim3(static_cast<unsigned>(std::min<std::int64_t>(items, 1 << 30))), dim3(kWalkers),
               sizeof(float) * S::kFloats, o);
}

// f of the shape that a plan means.
template <typename F>
auto with_shape(const LanePlan& plan, F&& f) {
  switch (plan.lanes * 256 + plan.states * 16 + plan.per_team) {
    case 4 * 256 + 4 * 16 + 2: return f(UnwindShape<4, 4, 2, 4>());
    case 4 * 256 + 4 * 16 + 1: return f(UnwindShape<4, 4, 1, 4>());
    case 8 * 256 + 2 * 16 + 1: return f(UnwindShape<8, 2, 1, 8>());
    case 16 * 256 + 1 * 16 + 1: return f(UnwindShape<16, 1, 1, 8>());
    case 8 * 256 + 4 * 16 + 1: return f(UnwindShape<8, 4, 1, 4>());
    case 16 * 256 + 4 * 16 + 1: return f(UnwindShape<16, 4, 1, 4>());
    default: return f(UnwindShape<32, 8, 1, 4>());
  }
}

}  // namespace

bool run_fast_backward(Context& ctx, const Problem& p, const Gradients& given) {
  if (!fits_tiles(p)) return false;
  const LanePlan plan = choose_backward(std::ssize(p.runs.runs), p.groups, p.channels / p.groups, p.u.size(2),
                                        p.whole_rows && p.runs.requests.empty(), p.d_state,
                                        cuda::limits_of(ctx).multiprocessors);
  const std::size_t shared =
      with_shape(plan, [](auto shape) { return sizeof(float) * decltype(shape)::kFloats; });
  if (shared > static_cast<std::size_t>(cuda::limits_of(ctx).shared_memory_per_block)) return false;
  Gradients gradients = given;
  if (!gradients.checkpoints) {
    Problem states = p;
    states.out = states.last_state = {};
    states.checkpoints = ctx.empty({count_checkpoints(p.runs), p.d_state, p.channels});
    if (states.checkpoints.numel() > 0 && !run_fast_forward(ctx, states)) return false;
    gradients.checkpoints = states.checkpoints;
  }
  const UploadedPieces uploaded = upload_pieces(ctx, p, plan.piece > 0 ? plan.piece : kWholeRuns);
  const bool roles = suits_roles(plan, p.channels / p.groups) && fits_roles(ctx, p, gradients);
  const std::int64_t in_block = roles ? kRolesChannels : kWalkers / plan.lanes * plan.per_team;
  const std::int64_t blocks = (p.channels / p.groups + in_block - 1) / in_block;
  Tensor carried;
  Tensor handed;
  Tensor turns;
  if (plan.in_turn) {
    handed = ctx.empty({p.u.size(0), p.d_state, p.channels});
    turns = ctx.zeros({1 + p.u.size(0) * p.groups * blocks * (roles ? kRolesWarps : 1)}, DType::i32);
  } else if (uploaded.pieces.count > std::ssize(p.runs.runs)) {
    carried = gradients_between(ctx, p, gradients, plan.piece);
  }
  const PartialSums sums = make_sums(ctx, p, gradients, blocks, uploaded.pieces.count);
  if (uploaded.pieces.count * p.channels > 0)
    with_shape(plan, [&](auto shape) {
      UnwindOperands o(p, gradients, sums, uploaded.pieces);
      if (carried) o.carried = static_cast<const float*>(carried.raw());
      if (handed) {
        o.handed = static_cast<float*>(handed.raw());
        o.turns = static_cast<int*>(turns.raw());
      }
      if (roles)
        run_roles(ctx, o);
      else
        launch_tiles<decltype(shape)>(ctx, o);
    });
  finish_sums(ctx, p, gradients, sums);
  return true;
}

}  // namespace krait::scan
