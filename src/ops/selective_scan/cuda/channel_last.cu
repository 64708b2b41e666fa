// The forward of the call that a Mamba block makes: u, delta, z and out of one type and with channels side by
// side, softplus and gate, at most 16 states. Half of a block's warps walk tokens, the others move: they make
// dt and dt u of later tokens and turn sums over states into outputs. Walkers and movers meet once a body of
// tokens, and in between fill the gaps that the others leave.
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "core/cuda/meeting.cuh"
#include "ops/selective_scan/cuda/channel_last.cuh"
#include "ops/selective_scan/cuda/channel_last.h"

namespace krait::scan {
namespace channel_last {
namespace {

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

// A group meets behind each body, and all of them one body before a tile of B and C ends, of which the next
// one is there then, and nobody reads the one before any more.
template <typename S>
__device__ __forceinline__ void meet_behind(int body, int group) {
  if (S::kGroups == 1 || (body + 2) % S::kBodies == 0)
    cuda::meet<kThreads>();
  else
    cuda::meet<S::kGroupThreads>(2 + group);
}

template <typename S>
__device__ __forceinline__ void move_piece(const Operands& o, const Item<S>& item, int bodies, char* shared,
                                           int thread) {
  using BAndC = typename S::BAndC;
  static_assert(BAndC::kRounds == 1);
  const Piece& piece = item.piece;
  const BAndC factors = {o.in.B.variable, o.in.C.variable, piece.row, item.group,
                         static_cast<int>(o.in.d_state)};
  const bool packed = factors.packed(piece);
  typename BAndC::Narrow factor;
  if (packed) factor = factors.narrow(piece, thread);
  const auto is_whole = [&](int tile) { return packed && (tile + 1) * std::int64_t{kTile} <= piece.count; };
  const auto ask_factors = [&](int tile) {
    if (is_whole(tile)) factor.load();
    factor.advance(kTile);
  };
  const auto put_factors = [&](int tile) {
    const std::int64_t begin = std::int64_t{tile} * kTile;
    if (begin >= piece.count) return;
    const auto count = static_cast<int>(begin + kTile < piece.count ? kTile : piece.count - begin);
    const Tile32 tokens(o.pieces, piece, begin, count);
    auto* const to = reinterpret_cast<float*>(shared + S::kFactors) + tile % 3 * BAndC::kFloats;
    if (is_whole(tile)) {
      with_narrow(o.in.B.variable.dtype,
                  [&](auto t) { factors.template store<decltype(t)>(tokens, thread, factor, to); });
    } else {
      typename BAndC::Elements elements;
      factors.load(tokens, thread, 0, elements);
      factors.store(tokens, thread, 0, elements, to);
    }
  };

  Mover<S> mine(o, item, shared, thread);
  ask_factors(0);
#pragma unroll 1
  for (int body = 0; body < 2 + S::kAhead; ++body) mine.ask(body);
  put_factors(0);
  ask_factors(1);
  cuda::wait_for_copies<S::kAhead>();
#pragma unroll 1
  for (int body = 0; body < 2; ++body) mine.prepare(body);
  cuda::meet<kThreads>();
#pragma unroll 1
  for (int body = 0; body < bodies; ++body) {
    if (body % S::kBodies == 0) {
      put_factors(body / S::kBodies + 1);
      ask_factors(body / S::kBodies + 2);
    }
    cuda::wait_for_copies<S::kAhead - 1>();
    if (body > 0) mine.finish(body - 1);
    mine.prepare(body + 2);
    mine.ask(body + 2 + S::kAhead);  // where the body before lay
    meet_behind<S>(body, thread / 32 % S::kGroups);
  }
  if (bodies > 0) mine.finish(bodies - 1);
}

template <typename S>
__device__ __forceinline__ void walk_piece(const Operands& o, const Item<S>& item, int bodies, char* shared,
                                           int thread) {
  using BAndC = typename S::BAndC;
  constexpr int kPerTeam = S::kPerTeam;
  constexpr int kStates = S::kStates;
  const Inputs<float>& in = o.in;
  const Piece& piece = item.piece;
  // Neighbours are of different teams and read the same of B and C: 16 bytes a lane take fewer passes of
  // shared memory where neighbours have one address.
  const int warp = thread / 32;
  const int lane = thread / 2 % S::kLanes;
  const int team = thread % 2 + thread % 32 / 8 * 2;
  const int d_state = static_cast<int>(in.d_state);
  // f(channel, state, c, k) for those of this thread that exist.
  const auto each_state = [&](auto&& f) {
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c) {
      const int place = team * kPerTeam + (c ^ (lane % kPerTeam));
      const int channel = warp * S::kWarpChannels + S::channel_at(place);
#pragma unroll
      for (int k = 0; k < kStates; ++k)
        if (const int n = lane * kStates + k; channel < item.channels && n < d_state)
          f(item.first + channel, n, c, k);
    }
  };
  float A[kPerTeam][kStates] = {};
  float h[kPerTeam][kStates] = {};
  each_state([&](std::int64_t d, int n, int c, int k) {
    A[c][k] = kLog2E * in.A.get(d, n);
    h[c][k] = piece.part > 0 && o.carried != nullptr
                  ? o.carried[(item.piece_index * d_state + n) * in.channels + d]
                  : in.state_before(piece, d, n);
  });
  const char* cells[kPerTeam];
#pragma unroll
  for (int c = 0; c < kPerTeam; ++c)
    cells[c] = shared + S::kCells + warp * S::kCellWarp + 16 * (team * kPerTeam + (c ^ (lane % kPerTeam)));
  const char* const factors = shared + S::kFactors + lane * kStates * sizeof(float);
  char* const sums = shared + S::kSums + warp * S::kSumWarp +
                     (kPerTeam == 4   ? 8 * (4 * team + lane)
                      : kPerTeam == 2 ? 8 * (2 * team + lane % 2) + lane / 2 * 4
                                      : 4 * (4 * team + lane));
  cuda::meet<kThreads>();

  // dt and dt u of two tokens, and B and C of one, on their way while what is before them is walked.
  float4 next_cell[kPerTeam];
  float next_B[kStates];
  float next_C[kStates];
  const auto load_cells = [&](int slot, int pair) {
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c)
      next_cell[c] = *reinterpret_cast<const float4*>(cells[c] + slot + pair * S::kCellPair);
  };
  const auto load_factors = [&](int rows, int token) {
    const float* const row = reinterpret_cast<const float*>(factors + rows) + token * BAndC::kRow;
    load_shared(row, next_B);
    load_shared(row + S::kAll, next_C);
  };
  load_cells(0, 0);
  load_factors(0, 0);
  int rows = 0;
#pragma unroll 1
  for (int body = 0; body < bodies; ++body) {
    const int slot = body * S::kCellSlot & (S::kCellRing - 1);
    const int slot_behind = (body + 1) * S::kCellSlot & (S::kCellRing - 1);
    const int rows_here = rows;
    rows = rows + S::kFactorBody == S::kFactorRing ? 0 : rows + S::kFactorBody;
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
        load_factors(rows_here, token + 1);
      else
        load_factors(rows, 0);
      if (s == 0)
#pragma unroll
        for (int c = 0; c < kPerTeam; ++c) cell[c] = next_cell[c];
      if (s == (S::kApart ? 0 : 1)) {
        if (token / 2 + 1 < S::kPairs)
          load_cells(slot, token / 2 + 1);
        else
          load_cells(slot_behind, 0);
      }
#pragma unroll
      for (int c = 0; c < kPerTeam; ++c) {
        const float dt = s == 0 ? cell[c].x : cell[c].z;
        const float x = s == 0 ? cell[c].y : cell[c].w;
#pragma unroll
        for (int k = 0; k < kStates; ++k) {
          h[c][k] = fmaf(exp2_fast(dt * A[c][k]), h[c][k], x * B[k]);
          y[s][c] = k == 0 ? C[k] * h[c][k] : fmaf(C[k], h[c][k], y[s][c]);
        }
      }
      if (s == 0) continue;
      char* const to = sums + (body & 1) * S::kSumSlot + (S::kApart ? token - 1 : token / 2) * S::kSumRow;
      if constexpr (S::kApart) {
        *reinterpret_cast<float*>(to) = y[0][0];
        *reinterpret_cast<float*>(to + S::kSumRow) = y[1][0];
      } else {
        sum_over_team<S>(y, lane, to);
      }
    }
    meet_behind<S>(body, warp / (S::kWalkingWarps / S::kGroups));
  }
  each_state([&](std::int64_t d, int n, int c, int k) {
    if (o.last_state && piece.last) o.last_state.set(h[c][k], piece.sequence, d, n);
  });
}

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kResident) scan_channel_last(Operands o) {
  extern __shared__ __align__(1024) char shared[];
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t i = blockIdx.x; i < Item<S>::count(o.in, o.pieces); i += gridDim.x) {
    const Item<S> item(o.in, o.pieces, i);
    const int bodies = (static_cast<int>(item.piece.count) + S::kBody - 1) / S::kBody;
    if (i != blockIdx.x) __syncthreads();  // all that the item before left has been read
    // The same in all lanes, as the compiler sees.
    if (__shfl_sync(0xffffffffU, thread / 32, 0) < kWalkers / 32)
      walk_piece(o, item, bodies, shared, thread);
    else
      move_piece(o, item, bodies, shared, thread - kWalkers);
  }
}

template <typename S>
bool launch(Context& ctx, const Operands& o) {
  const std::int64_t in_group = o.in.channels / o.in.groups;
  const std::int64_t items = o.pieces.count * o.in.groups * ((in_group + S::kChannels - 1) / S::kChannels);
  constexpr std::size_t kShared = S::kBytes;
  if (kShared > static_cast<std::size_t>(cuda::limits_of(ctx).shared_memory_per_block)) return false;
  cuda::launch(ctx, "selective_scan", scan_channel_last<S>,
               dim3(static_cast<unsigned>(std::min<std::int64_t>(items, 1 << 30))), dim3(kThreads), kShared,
               o);
  return true;
}

}  // namespace
}  // namespace channel_last

namespace {

// True where lanes may bring kTogether channels of a token at once.
bool has_channels_together(const Tensor& t) {
  const std::int64_t bytes = 4 * size_of(t.dtype());
  const auto even = [&](std::int64_t stride) { return stride % 4 == 0; };
  return t.stride(1) == 1 && even(t.stride(0)) && even(t.stride(2)) &&
         reinterpret_cast<std::uintptr_t>(t.raw()) % static_cast<std::uintptr_t>(bytes) == 0;
}

}  // namespace

bool fits_channel_last(const Problem& p) {
  constexpr std::int64_t kMostTokens = 1 << 30;
  constexpr std::int64_t kMostApart = 1 << 24;  // elements from token to token
  if (!fits_tiles(p) || !p.out || !p.z || p.checkpoints || !p.delta_softplus || p.d_state > 16 ||
      p.u.size(2) >= kMostTokens || !p.runs.positions.empty() || !p.runs.requests.empty() ||
      p.channels / p.groups % 4 != 0)
    return false;
  for (const Tensor* t : {&p.u, &p.delta, &p.z, &p.out})
    if (t->dtype() != p.u.dtype() || !has_channels_together(*t) || std::abs(t->stride(2)) >= kMostApart)
      return false;
  return true;
}

bool run_channel_last(Context& ctx, const Problem& p, const Pieces& pieces, const LanePlan& plan,
                      const float* carried) {
  const channel_last::Operands o = {.in = Inputs<float>(p),
                                    .out = AnyView<3>(p.out),
                                    .last_state = StateView<float, 3>(p.last_state),
                                    .pieces = pieces,
                                    .carried = carried};
  bool done = false;
  cuda::dispatch_element(p.u.dtype(), "[selective_scan] u", [&](auto t) {
    using T = decltype(t);
    if (plan.per_team == 4)
      done = channel_last::launch<channel_last::Shape<T, 4>>(ctx, o);
    else if (plan.per_team == 2)
      done = channel_last::launch<channel_last::Shape<T, 2>>(ctx, o);
    else
      done = channel_last::launch<channel_last::Shape<T, 1>>(ctx, o);
  });
  return done;
}

}  // namespace krait::scan
