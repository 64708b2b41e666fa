// The forward of the call that a Mamba block makes: u, delta, z and out of one type and with channels side by
// side, softplus and gate, at most 16 states. Half of a block's warps walk tokens, the others move: they make
// dt and dt u of later tokens and turn sums over states into outputs. Walkers and movers meet once a body of
// tokens, and in between fill the gaps that the others leave.
#include <cstdint>
#include <limits>

#include "ops/selective_scan/cuda/channel_last.h"
#include "ops/selective_scan/cuda/channel_last_walk.cuh"
#include "ops/selective_scan/cuda/kernels.h"

namespace krait::scan {
namespace channel_last {
namespace {

template <typename S>
__device__ __forceinline__ void move_piece(const Operands& o, const Item<S>& item, int bodies, char* shared,
                                           int thread) {
  using BAndC = typename S::BAndC;
  static_assert(BAndC::kRounds == 1);
  const Piece& piece = item.piece;
  const BAndC factors = {o.in.B.variable, o.in.C.variable, piece.row, item.group,
                         static_cast<int>(o.in.d_state)};
  // Whole tiles of B and C of the type of u are on their way while the tile before is walked, if they are
  // packed.
  using T = typename S::T;
  constexpr int kBytes = sizeof(T);
  const bool packed = factors.template packed<kBytes>(piece) && o.in.B.variable.dtype == o.in.u.dtype;
  typename BAndC::template Packed<kBytes> factor;
  if (packed) factor = factors.template first<kBytes>(piece, thread);
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
      factors.template store<T>(tokens, thread, factor, to);
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
#pragma unroll 1
  for (int tile = 0; tile < S::kTilesAhead; ++tile) {
    put_factors(tile);
    ask_factors(tile + 1);
  }
  cuda::wait_for_copies<S::kAhead>();
#pragma unroll 1
  for (int body = 0; body < 2; ++body) mine.prepare(body);
  cuda::meet<kThreads>();
#pragma unroll 1
  for (int body = 0; body < bodies; ++body) {
    if (body % S::kBodies == 0) {
      put_factors(body / S::kBodies + S::kTilesAhead);
      ask_factors(body / S::kBodies + S::kTilesAhead + 1);
    }
    cuda::wait_for_copies<S::kAhead - 1>();
    if (body > 0) mine.finish(body - 1);
    mine.prepare(body + 2);
    mine.ask(body + 2 + S::kAhead);  // where the body before lay
    meet_behind<S>(body, thread / 32 % S::kGroups);
  }
  if (bodies > 0) mine.finish(bodies - 1);
}

template <typename S, bool kCheckpoints>
__global__ void __launch_bounds__(kThreads, S::kResident) scan_channel_last(Operands o) {
  extern __shared__ __align__(1024) char shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const Item<S> item(o.in, o.pieces, blockIdx.x);
  const int bodies = (static_cast<int>(item.piece.count) + S::kBody - 1) / S::kBody;
  // The same in all lanes, as the compiler sees.
  if (__shfl_sync(0xffffffffU, thread / 32, 0) < kWalkers / 32)
    Walker<S>(o, item, shared, thread).template walk<kCheckpoints>(o, item, bodies);
  else
    move_piece(o, item, bodies, shared, thread - kWalkers);
}

template <typename S>
bool launch(Context& ctx, const Operands& o) {
  constexpr std::int64_t kMostBlocks = std::numeric_limits<std::int32_t>::max();
  const std::int64_t in_group = o.in.channels / o.in.groups;
  const std::int64_t blocks = o.pieces.count * o.in.groups * ((in_group + S::kChannels - 1) / S::kChannels);
  constexpr std::size_t kShared = S::kBytes;
  if (blocks > kMostBlocks ||
      kShared > static_cast<std::size_t>(cuda::limits_of(ctx).shared_memory_per_block))
    return false;
  const auto kernel = o.checkpoints == nullptr ? scan_channel_last<S, false> : scan_channel_last<S, true>;
  cuda::launch(ctx, "selective_scan", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kShared,
               o);
  return true;
}

}  // namespace
}  // namespace channel_last

bool fits_channel_last(const Problem& p) {
  return p.runs.requests.empty() && has_channels_together(p, {&p.u, &p.delta, &p.z, &p.out});
}

bool run_channel_last(Context& ctx, const Problem& p, const Pieces& pieces, const LanePlan& plan,
                      const float* carried) {
  const channel_last::Operands o = {
      .in = Inputs<float>(p),
      .out = AnyView<3>(p.out),
      .last_state = StateView<float, 3>(p.last_state),
      .checkpoints = p.checkpoints ? static_cast<float*>(p.checkpoints.raw()) : nullptr,
      .pieces = pieces,
      .carried = carried};
  bool done = false;
  cuda::dispatch_element(p.u.dtype(), "[selective_scan] u", [&](auto t) {
    using T = decltype(t);
    if (plan.lanes == 8)
      done = channel_last::launch<channel_last::Shape<T, 8, 1>>(ctx, o);
    else if (plan.per_team == 4)
      done = channel_last::launch<channel_last::Shape<T, 4, 4>>(ctx, o);
    else if (plan.per_team == 2)
      done = channel_last::launch<channel_last::Shape<T, 4, 2>>(ctx, o);
    else
      done = channel_last::launch<channel_last::Shape<T, 4, 1>>(ctx, o);
  });
  return done;
}

}  // namespace krait::scan
