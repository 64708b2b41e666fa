// The fast forward: real states, B and C variable. Half of a block, the walkers, walk the tokens of a tile in
// order, from dt and dt u to sums over states; the other half, the movers, turn the sums of the tile before
// into outputs meanwhile and make dt and dt u of the next one.
#include <algorithm>
#include <cstdint>

#include "core/cuda/meeting.cuh"
#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/stage.cuh"

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

template <int kLanes, int kStates, int kPerTeam>
struct Shape : Teams<kLanes, kStates, kPerTeam> {
  using Base = Teams<kLanes, kStates, kPerTeam>;
  static constexpr int kSteps = kLanes / kPerTeam;        // tokens whose sums over lanes are made together
  static constexpr int kAhead = kSteps < 4 ? kSteps : 4;  // tokens whose numbers are loaded together
  static constexpr int kBody = kSteps < 4       ? 4
                               : kSteps < kTile ? 2 * kSteps
                                                : kTile;      // tokens of a loop's body
  static constexpr int kCells = 2 * kTile * Base::kChannels;  // floats of a buffer of dt and dt u
  static constexpr int kFloats = 2 * (kCells + Factors<Base::kAll>::kFloats) + 2 * Base::kChannels;
};

// dt and dt u of a channel and a token lie side by side. Movers write 8 channels each; which pairs of
// channels are exchanged keeps them in different banks.
template <typename S>
__device__ __forceinline__ int cell(int row, int channel) {
  const int pair = channel / 2;
  return row * S::kChannels + (pair ^ (pair / 8 & 3)) * 2 + channel % 2;
}

// The first pass over runs in pieces needs no end of the last one.
__device__ __forceinline__ bool skipped(const Operands& o, const Piece& piece) {
  return o.ends != nullptr && piece.last_of_run;
}

// The shared memory of a block.
template <typename S>
struct Buffers {
  float* shared;

  __device__ __forceinline__ float2* cells(int buffer) const {
    return reinterpret_cast<float2*>(shared + buffer * S::kCells);
  }
  __device__ __forceinline__ float* factors(int buffer) const {
    return shared + 2 * S::kCells + buffer * Factors<S::kAll>::kFloats;
  }
  __device__ __forceinline__ float* bias() const {
    return shared + 2 * (S::kCells + Factors<S::kAll>::kFloats);
  }
  __device__ __forceinline__ float* skip() const { return bias() + S::kChannels; }
};

__device__ __forceinline__ void meet_all() { cuda::meet<kWalkers + kMovers>(); }

// kStatesOnly: no outputs, but states that later passes start from.
template <typename S, bool kStatesOnly>
__device__ __forceinline__ void walk(const Operands& o, const Buffers<S>& buffers) {
  constexpr int kStates = S::kStates;
  constexpr int kPerTeam = S::kPerTeam;
  const Inputs<float>& in = o.in;
  const int lane = static_cast<int>(threadIdx.x) % S::kLanes;
  const int team = static_cast<int>(threadIdx.x) / S::kLanes;
  const int d_state = static_cast<int>(in.d_state);
  const auto channel_of = [&](int i) { return team * kPerTeam + (i ^ (lane % kPerTeam)); };

  for (std::int64_t i = blockIdx.x; i < Item<S>::count(in, o.pieces); i += gridDim.x) {
    const Item<S> item(in, o.pieces, i);
    if (skipped(o, item.piece)) continue;
    const Piece& piece = item.piece;
    // f(channel, state, i, k) for those of this thread that exist.
    const auto each_state = [&](auto&& f) {
#pragma unroll
      for (int c = 0; c < kPerTeam; ++c)
#pragma unroll
        for (int k = 0; k < kStates; ++k)
          if (const int n = lane * kStates + k; channel_of(c) < item.channels && n < d_state)
            f(item.first + channel_of(c), n, c, k);
    };
    float A[kPerTeam][kStates] = {};
    float h[kPerTeam][kStates] = {};
    each_state([&](std::int64_t d, int n, int c, int k) {
      A[c][k] = kLog2E * in.A.get(d, n);
      if (piece.part > 0 && o.carried != nullptr)
        h[c][k] = o.carried[(item.piece_index * d_state + n) * in.channels + d];
      else if (o.ends == nullptr)
        h[c][k] = in.state_before(piece, d, n);
    });
    float sum_of_steps[kPerTeam] = {};

    std::int64_t request = piece.requests_begin;
    const auto keep_states = [&](std::int64_t tokens) {
      if (o.checkpoints != nullptr && piece.has_checkpoint_after(tokens)) {
        const std::int64_t at = piece.checkpoint + tokens / kCheckpointSteps - 1;
        each_state([&](std::int64_t d, int n, int c, int k) {
          o.checkpoints[(at * d_state + n) * in.channels + d] = h[c][k];
        });
      }
      if constexpr (!kStatesOnly) {
        for (; request < piece.requests_end && o.pieces.requests[request].count == tokens; ++request) {
          const StateRequest& wanted = o.pieces.requests[request];
          each_state([&](std::int64_t d, int n, int c, int k) {
            o.states.set(h[c][k], wanted.row, wanted.slot, d, n);
          });
        }
      }
    };
    keep_states(0);

    meet_all();
    meet_all();
    meet_all();  // the first tile is there
    TileCursor tile(o.pieces, piece, !kStatesOnly);
    for (int buffer = 0; tile.count > 0; buffer ^= 1) {
      // dt, dt u, B and C of kAhead tokens, on their way while the tokens before them are walked.
      struct Numbers {
        float2 step[S::kAhead][kPerTeam];
        float B[S::kAhead][kStates];
        float C[S::kAhead][kStates];
      };
      const auto load = [&](int row, Numbers& to) {
#pragma unroll
        for (int s = 0; s < S::kAhead; ++s) {
#pragma unroll
          for (int c = 0; c < kPerTeam; ++c)
            to.step[s][c] = buffers.cells(buffer)[cell<S>(row + s, channel_of(c))];
          const float* const from =
              buffers.factors(buffer) + (row + s) * Factors<S::kAll>::kRow + lane * kStates;
          load_shared(from, to.B[s]);
          if constexpr (!kStatesOnly) load_shared(from + S::kAll, to.C[s]);
        }
      };
      Numbers next;
      load(0, next);
      // Rows behind the last token leave the state as it is: always a whole body.
      for (int row = 0; row < tile.count; row += S::kBody) {
#pragma unroll
        for (int first = 0; first < S::kBody; first += S::kSteps) {
          float y[S::kSteps][kPerTeam];
#pragma unroll
          for (int ahead = 0; ahead < S::kSteps; ahead += S::kAhead) {
            const Numbers here = next;
            // Behind the last row the last ones again: nobody uses them, and what lies there is being
            // written.
            load(min(row + first + ahead + S::kAhead, kTile - S::kAhead), next);
#pragma unroll
            for (int s = 0; s < S::kAhead; ++s)
#pragma unroll
              for (int c = 0; c < kPerTeam; ++c) {
                const float2 step = here.step[s][c];
                float sum = 0.0F;
#pragma unroll
                for (int k = 0; k < kStates; ++k) {
                  h[c][k] = fmaf(exp2_fast(step.x * A[c][k]), h[c][k], step.y * here.B[s][k]);
                  if constexpr (!kStatesOnly) sum = fmaf(here.C[s][k], h[c][k], sum);
                }
                if constexpr (kStatesOnly)
                  sum_of_steps[c] += step.x;
                else
                  y[ahead + s][c] = sum;
              }
          }
          if constexpr (!kStatesOnly) {
            // Nobody but these lanes reads dt of these rows, and all of them have.
            __syncwarp();
            sum_over_team<S>(y, [&](int step, float sum) {
              buffers.cells(buffer)[cell<S>(row + first + step, team * kPerTeam + lane % kPerTeam)].x = sum;
            });
          }
        }
      }
      tile.advance(o.pieces, piece);
      keep_states(tile.begin);
      meet_all();
    }

    each_state([&](std::int64_t d, int n, int c, int k) {
      if (o.ends != nullptr)
        o.ends[(item.piece_index * d_state + n) * in.channels + d] = h[c][k];
      else if (!kStatesOnly && o.last_state && piece.last)
        o.last_state.set(h[c][k], piece.sequence, d, n);
      if (o.steps != nullptr && n == 0) o.steps[item.piece_index * in.channels + d] = sum_of_steps[c];
    });
  }
}

template <typename S, bool kByChannel, bool kStatesOnly>
__device__ __forceinline__ void move(const Operands& o, const Buffers<S>& buffers) {
  using Moves = MoverShare<S::kChannels, kByChannel>;
  using Elements = cuda::Bits<Moves::kTogether>;
  using BAndC = Factors<S::kAll>;
  constexpr int kTogether = Moves::kTogether;
  // A mover of a small tile asks for what it needs next before it waits; one of a large tile would have no
  // registers for that, and has time.
  constexpr bool kEarly = Moves::kRounds == 1;
  constexpr bool kEarlyFactors = BAndC::kRounds == 1;
  constexpr int kFactorsAtOnce = kEarlyFactors ? 1 : 2;
  const Inputs<float>& in = o.in;
  const int mover = static_cast<int>(threadIdx.x) - kWalkers;
  const Moves moves(mover);

  for (std::int64_t i = blockIdx.x; i < Item<S>::count(in, o.pieces); i += gridDim.x) {
    const Item<S> item(in, o.pieces, i);
    if (skipped(o, item.piece)) continue;
    const Piece& piece = item.piece;
    const auto track = [&](const AnyView<3>& view) {
      return Track<S::kChannels, kByChannel>(view, moves, piece, item.first);
    };
    const auto u_track = track(in.u);
    const auto delta_track = track(in.delta);
    const auto z_track = track(in.z);
    const auto out_track = track(o.out);
    bool packed = u_track.packed(piece, item.channels) && delta_track.packed(piece, item.channels);
    if constexpr (!kStatesOnly)
      packed = packed && z_track.packed(piece, item.channels) && out_track.packed(piece, item.channels);
    const auto whole = [&](const TileCursor& at) { return packed && at.count == kTile; };
    const auto tile_at = [&](const TileCursor& at) { return Tile32(o.pieces, piece, at.begin, at.count); };
    const BAndC factors = {in.B.variable, in.C.variable, piece.row, item.group, static_cast<int>(in.d_state)};
    Elements u;
    Elements delta;
    Elements u_of_output;
    Elements z = {};
    typename BAndC::Elements factor = {};

    const auto ask = [&](const TileCursor& at) {
      if (at.count == 0) return;
      const Tile32 tile = tile_at(at);
      if constexpr (kEarlyFactors) factors.load(tile, mover, 0, factor);
      if (!kEarly || !whole(at)) return;
      u_track.load_packed(tile, 0, u);
      delta_track.load_packed(tile, 0, delta);
    };
    const auto ask_for_outputs = [&](const TileCursor& at) {
      if (kStatesOnly || !kEarly || at.count == 0 || !whole(at)) return;
      const Tile32 tile = tile_at(at);
      u_track.load_packed(tile, 0, u_of_output);
      if (in.z) z_track.load_packed(tile, 0, z);
    };
    const auto prepare_round = [&](const Tile32& tile, int round, float2* cells) {
      float x[kTogether];
      float dt[kTogether];
      u.to_floats(in.u.dtype, x);
      delta.to_floats(in.delta.dtype, dt);
#pragma unroll
      for (int e = 0; e < kTogether; ++e) {
        dt[e] += buffers.bias()[moves.channel_of(round, e)];
        if (in.softplus) dt[e] = softplus_fast(dt[e]);
        // Empty rows leave the state as it is.
        const bool there = tile.row(moves.slot_of(round, e)) < tile.count;
        x[e] = there ? dt[e] * x[e] : 0.0F;
        dt[e] = there ? dt[e] : 0.0F;
      }
      if constexpr (kByChannel && kTogether % 2 == 0) {
        const int row = tile.row(moves.slot_of(round, 0));
#pragma unroll
        for (int e = 0; e < kTogether; e += 2)
          *reinterpret_cast<float4*>(&cells[cell<S>(row, moves.channel_of(round, e))]) =
              make_float4(dt[e], x[e], dt[e + 1], x[e + 1]);
      } else {
#pragma unroll
        for (int e = 0; e < kTogether; ++e)
          cells[cell<S>(tile.row(moves.slot_of(round, e)), moves.channel_of(round, e))] =
              make_float2(dt[e], x[e]);
      }
    };
    const auto prepare = [&](const TileCursor& at, int buffer) {
      if (at.count == 0) return;
      const Tile32 tile = tile_at(at);
#pragma unroll kFactorsAtOnce
      for (int round = 0; round < BAndC::kRounds; ++round) {
        if constexpr (!kEarlyFactors) factors.load(tile, mover, round, factor);
        factors.store(tile, mover, round, factor, buffers.factors(buffer));
      }
      if (whole(at)) {
#pragma unroll
        for (int round = 0; round < Moves::kRounds; ++round) {
          if constexpr (!kEarly) {
            u_track.load_packed(tile, round, u);
            delta_track.load_packed(tile, round, delta);
          }
          prepare_round(tile, round, buffers.cells(buffer));
        }
      } else {
#pragma unroll 1
        for (int round = 0; round < Moves::kRounds; ++round) {
          u_track.load(tile, round, item.channels, u);
          delta_track.load(tile, round, item.channels, delta);
          prepare_round(tile, round, buffers.cells(buffer));
        }
      }
    };
    const auto finish_round = [&](const Tile32& tile, int round, const float2* cells, float(&x)[kTogether]) {
      float gate[kTogether];
      u_of_output.to_floats(in.u.dtype, x);
      z.to_floats(in.z.dtype, gate);
#pragma unroll
      for (int e = 0; e < kTogether; ++e) {
        const int channel = moves.channel_of(round, e);
        x[e] =
            fmaf(buffers.skip()[channel], x[e], cells[cell<S>(tile.row(moves.slot_of(round, e)), channel)].x);
        if (in.z) x[e] *= gate[e] * sigmoid_fast(gate[e]);
      }
    };
    const auto finish = [&](const TileCursor& at, int buffer) {
      if (kStatesOnly || at.count == 0) return;
      const Tile32 tile = tile_at(at);
      float x[kTogether];
      if (whole(at)) {
#pragma unroll
        for (int round = 0; round < Moves::kRounds; ++round) {
          if constexpr (!kEarly) {
            u_track.load_packed(tile, round, u_of_output);
            if (in.z) z_track.load_packed(tile, round, z);
          }
          finish_round(tile, round, buffers.cells(buffer), x);
          out_track.store_packed(tile, round, x);
        }
      } else {
#pragma unroll 1
        for (int round = 0; round < Moves::kRounds; ++round) {
          u_track.load(tile, round, item.channels, u_of_output);
          if (in.z) z_track.load(tile, round, item.channels, z);
          finish_round(tile, round, buffers.cells(buffer), x);
          out_track.store(tile, round, item.channels, x);
        }
      }
    };

    meet_all();  // all that the item before left has been read
    if (mover < S::kChannels) {
      const bool mine = mover < item.channels;
      buffers.bias()[mover] = in.delta_bias && mine ? in.delta_bias.load(item.first + mover) : 0.0F;
      buffers.skip()[mover] = !kStatesOnly && in.D && mine ? in.D.load(item.first + mover) : 0.0F;
    }
    // The walkers are at tile `step`; the tile before it ends in the buffer that the next one gets.
    TileCursor ahead(o.pieces, piece, !kStatesOnly);
    TileCursor here = ahead;
    here.count = 0;
    TileCursor before = here;
    for (int step = -2;; ++step) {
      const int buffer = (step + 1) & 1;
      finish(before, buffer);
      if (step >= 0 && here.count == 0) break;
      ask_for_outputs(here);
      if (step >= -1) {
        prepare(ahead, buffer);
        before = here;
        here = ahead;
        if (ahead.count > 0) ahead.advance(o.pieces, piece);
      }
      ask(ahead);
      meet_all();
    }
  }
}

template <typename S, bool kStatesOnly>
__global__ void __launch_bounds__(kWalkers + kMovers,
                                  S::kStates* S::kPerTeam <= 16 && S::kLanes <= 16 ? 2 : 1)
    scan_tiles(Operands o) {
  extern __shared__ __align__(16) float shared[];
  const Buffers<S> buffers = {shared};
  if (threadIdx.x < kWalkers)
    walk<S, kStatesOnly>(o, buffers);
  else if (o.by_channel)
    move<S, true, kStatesOnly>(o, buffers);
  else
    move<S, false, kStatesOnly>(o, buffers);
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

template <typename S, bool kStatesOnly>
void launch_tiles(Context& ctx, const Operands& o) {
  const std::int64_t in_group = o.in.channels / o.in.groups;
  const std::int64_t items = o.pieces.count * o.in.groups * ((in_group + S::kChannels - 1) / S::kChannels);
  cuda::launch(ctx, kStatesOnly ? "selective_scan_states" : "selective_scan", scan_tiles<S, kStatesOnly>,
               dim3(static_cast<unsigned>(std::min<std::int64_t>(items, 1 << 30))), dim3(kWalkers + kMovers),
               sizeof(float) * S::kFloats, o);
}

// f of the shape that a plan means.
template <typename F>
auto with_shape(const LanePlan& plan, F&& f) {
  switch (plan.lanes * 256 + plan.states * 16 + plan.per_team) {
    case 4 * 256 + 4 * 16 + 4: return f(Shape<4, 4, 4>());
    case 4 * 256 + 4 * 16 + 2: return f(Shape<4, 4, 2>());
    case 4 * 256 + 4 * 16 + 1: return f(Shape<4, 4, 1>());
    case 8 * 256 + 2 * 16 + 1: return f(Shape<8, 2, 1>());
    case 16 * 256 + 1 * 16 + 1: return f(Shape<16, 1, 1>());
    case 8 * 256 + 4 * 16 + 1: return f(Shape<8, 4, 1>());
    case 16 * 256 + 4 * 16 + 1: return f(Shape<16, 4, 1>());
    default: return f(Shape<32, 8, 1>());
  }
}

template <bool kStatesOnly>
void launch_tiles(Context& ctx, const Operands& o, const LanePlan& plan) {
  with_shape(plan, [&](auto shape) { launch_tiles<decltype(shape), kStatesOnly>(ctx, o); });
}

}  // namespace

bool run_fast_forward(Context& ctx, const Problem& p) {
  if (!fits_tiles(p)) return false;
  const LanePlan plan = choose_forward(std::ssize(p.runs.runs), p.groups, p.channels / p.groups, p.u.size(2),
                                       p.d_state, cuda::limits_of(ctx).multiprocessors);
  const std::size_t shared =
      with_shape(plan, [](auto shape) { return sizeof(float) * decltype(shape)::kFloats; });
  if (shared > static_cast<std::size_t>(cuda::limits_of(ctx).shared_memory_per_block)) return false;
  const UploadedPieces uploaded = upload_pieces(ctx, p, plan.piece);
  const Pieces& pieces = uploaded.pieces;
  if (pieces.count * p.channels == 0) return true;
  Operands o(p, pieces);
  Tensor states;
  Tensor steps;
  if (pieces.count > std::ssize(p.runs.runs)) {
    states = ctx.empty({pieces.count, p.d_state, p.channels});
    steps = ctx.empty({pieces.count, p.channels});
    Operands ends = o;
    ends.checkpoints = nullptr;
    ends.ends = static_cast<float*>(states.raw());
    ends.steps = static_cast<float*>(steps.raw());
    launch_tiles<true>(ctx, ends, plan);
    cuda::launch(ctx, "selective_scan_carry", carry_states,
                 dim3(cuda::blocks_for(ctx, pieces.count * p.d_state * p.channels, kWalkers)), dim3(kWalkers),
                 0, o.in, pieces, static_cast<const float*>(steps.raw()), static_cast<float*>(states.raw()));
    o.carried = static_cast<const float*>(states.raw());
  }
  p.out ? launch_tiles<false>(ctx, o, plan) : launch_tiles<true>(ctx, o, plan);
  return true;
}

}  // namespace krait::scan
