// The backward of the call that a Mamba block makes: u, delta, dout, z and their gradients of one type and
// with channels side by side, softplus and gate, at most 16 states. Half of a block's warps walk and unwind,
// the others move: they make dt, dt u and dy of the next tile and gradients of the present one, sub after
// sub, and have few registers, so that those that unwind have many.
#include <cstdint>
#include <cstdlib>

#include "core/cuda/backend.h"
#include "core/cuda/mbarrier.cuh"
#include "core/cuda/meeting.cuh"
#include "core/cuda/wgmma.cuh"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/unwind_roles.cuh"
#include "ops/selective_scan/cuda/unwind_roles.h"
#include "ops/selective_scan/cuda/unwind_roles_moves.cuh"

namespace krait::scan {
namespace roles {
namespace {

static_assert(Shape::kChannels == kRolesChannels && kUnwindingWarps == kRolesWarps);

#ifdef KRAIT_WGMMA

// Registers of a thread: a block begins with 128 of each.
constexpr int kUnwindRegisters = 176;
constexpr int kMoveRegisters = 80;
static_assert(kUnwindRegisters + kMoveRegisters == 2 * 128 && kUnwinders == kMovingThreads);

__device__ __forceinline__ unsigned address_of(const char* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// The item that a block takes. Where pieces are walked in turn, it is the next one that no block has, the
// last pieces of all rows first: the item that it waits for was then taken earlier, by a block that is at
// work.
struct Turn {
  std::int64_t item = blockIdx.x;
  std::int64_t chain = 0;  // of a row and a block of channels
  int before = 0;          // pieces of the row

  __device__ Turn(const Operands& o, int ticket) {
    if (o.handed == nullptr) return;
    const std::int64_t blocks = Item<Shape>::blocks(o.in) * o.in.groups;
    const std::int64_t chains = o.in.rows * blocks;
    chain = ticket % chains;
    before = static_cast<int>(ticket / chains);
    item = (chain / blocks * o.pieces.parts + o.pieces.parts - 1 - before) * blocks + chain % blocks;
  }
  __device__ int* done(const Operands& o, int warp) const {
    return o.turns + 1 + chain * kUnwindingWarps + warp;
  }
};

__device__ __forceinline__ void unwind_piece(const Operands& o, const Item<Shape>& item, const Turn& turn,
                                             int tiles, char* shared, int warp) {
  const Inputs<float>& in = o.in;
  const Piece& piece = item.piece;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Stand stand(lane);
  const int d_state = static_cast<int>(in.d_state);
  const int first = warp * kWarpChannels;
  // f(channel, state, c, k) for those of this lane that exist.
  const auto each_state = [&](auto&& f) {
#pragma unroll
    for (int c = 0; c < kPerTeam; ++c) {
      const int channel = first + stand.channel_of(c);
#pragma unroll
      for (int k = 0; k < kStates; ++k)
        if (const int n = stand.state_of(k); channel < item.channels && n < d_state)
          f(item.first + channel, n, c, k);
    }
  };
  if (o.handed != nullptr && !piece.last) {
    if (lane == 0) {
      const volatile int* const done = turn.done(o, warp);
      while (*done < turn.before) {
      }
      __threadfence();
    }
    __syncwarp();
  }
  Carried carried = {};
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

  float h[kPerTeam][kStates] = {};
  unsigned there = 0;  // which of these exist
  each_state([&](std::int64_t, int, int c, int k) { there |= 1U << (c * kStates + k); });
  // The state before a tile: a checkpoint, or what the piece starts from.
  const auto ask_state = [&](int tile) {
    const bool starts = tile == 0 && piece.part == 0;
    const bool from_initial = starts && piece.first && in.initial_state;
    const auto* from =
        static_cast<const float*>(in.initial_state.data) + piece.sequence * in.initial_state.stride[0];
    auto apart = static_cast<int>(in.initial_state.stride[1]);
    auto states_apart = static_cast<int>(in.initial_state.stride[2]);
    if (!starts) {
      from = o.checkpoints + (piece.checkpoint + tile - 1) * o.checkpoint_size;
      apart = 1;
      states_apart = static_cast<int>(in.channels);
    }
    from += item.first * apart + first * apart;
    const unsigned wanted = starts && !from_initial ? 0 : there;
#pragma unroll
    for (int k = 0; k < kStates; ++k)
#pragma unroll
      for (int c = 0; c < kPerTeam; ++c) {
        h[c][k] = 0.0F;
        if ((wanted >> (c * kStates + k) & 1U) != 0)
          h[c][k] = __ldcg(from + stand.state_of(k) * states_apart + stand.channel_of(c) * apart);
      }
  };

  const Place place(stand, shared, warp, lane);
  const unsigned cells_there = address_of(shared + kCellsThere + warp / kGroup * (8 * kSubs));
  const unsigned results_there = address_of(shared + kResultsThere + warp / kGroup * (8 * kSubs));
  if (tiles > 0) ask_state(tiles - 1);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const auto parity = static_cast<unsigned>(i % 2);
    const float* const factors = place.factors + i % 2 * BAndC::kFloats;
    cuda::wait_for_phase(address_of(shared + kFactorsThere) + 8 * parity, static_cast<unsigned>(i / 2 % 2));
    const auto wait_for_cells = [&](int slot) {
      cuda::wait_for_phase(cells_there + static_cast<unsigned>(8 * slot), parity);
    };
    wait_for_cells(slot_of(0, i));
    store_start(place.starts + slot_of(0, i) * kSlot, h);
#pragma unroll 1
    for (int sub = 0; sub + 1 < kSubs; ++sub) {
      walk_sub(place, slot_of(sub, i), factors + sub * kSub * BAndC::kRow, carried.A, h);
      const int next = slot_of(sub + 1, i);
      wait_for_cells(next);  // and so what the slot's states were replaced by has been read
      store_start(place.starts + next * kSlot, h);
    }

    constexpr int kOfPart = kSubs / kParts;
    const auto part_of = [&](int sub) {
      return address_of(shared) + static_cast<unsigned>(8 * (sub / kOfPart));
    };
#pragma unroll 1
    for (int sub = kSubs - 1; sub >= 0; --sub) {
      if (sub % kOfPart == kOfPart - 1) cuda::wait_for_phase(part_of(sub) + kPartialsRead, parity ^ 1U);
      const int slot = slot_of(sub, i);
      const Sub here(place, slot, factors + sub * (kSub * BAndC::kRow), carried);
      SubSums sums(here, carried);
      __syncwarp();  // who reads the cells that sums are put to has them
      sums.put(place, slot,
               place.partials + sub / kOfPart * kPartialPart + sub % kOfPart * (kSub * kPartialToken), lane);
      __syncwarp();
      cuda::arrive_if(cuda::arrives_for_warp(lane), results_there + static_cast<unsigned>(8 * slot));
      cuda::arrive_if(cuda::arrives_for_warp(lane) && sub % kOfPart == 0, part_of(sub) + kPartialsThere);
    }
    if (i + 1 < tiles) ask_state(tiles - 2 - i);
  }

  each_state([&](std::int64_t d, int n, int c, int k) {
    if (o.dA != nullptr) o.dA[(item.piece_index * d_state + n) * in.channels + d] = carried.dA[c][k];
    if (o.dinitial_state && piece.first) o.dinitial_state.set(carried.g[c][k], piece.sequence, d, n);
    if (o.handed != nullptr && !piece.first)
      o.handed[(piece.row * d_state + n) * in.channels + d] = carried.g[c][k];
  });
  if (o.handed != nullptr) {
    __threadfence();
    __syncwarp();
    if (lane == 0) atomicAdd(turn.done(o, warp), 1);
  }
}

template <typename T>
__device__ __forceinline__ void move_piece(const Operands& o, const Item<Shape>& item, int tiles,
                                           char* shared, int thread) {
  static_assert(BAndC::kRounds == 1);
  const Piece& piece = item.piece;
  const int warp = __shfl_sync(0xffffffffU, thread / 32, 0);
  const int lane = thread % 32;
  // B and C of the i-th tile to be unwound.
  const auto put_factors = [&](int i) {
    if (i >= tiles || warp >= kMovers / 32) return;
    const BAndC factors = {o.in.B.variable, o.in.C.variable, piece.row, item.group,
                           static_cast<int>(o.in.d_state)};
    const int begin = (tiles - 1 - i) * kTile;
    const int left = static_cast<int>(piece.count) - begin;
    const int count = left < kTile ? left : kTile;
    const Tile32 tile(o.pieces, piece, begin, count);
    auto* const to = reinterpret_cast<float*>(shared + kFactors + i % 2 * kFactorTile);
    typename BAndC::Elements elements;
    factors.load(tile, thread, 0, elements);
    factors.store(tile, thread, 0, elements, to);
    __syncwarp();
    cuda::arrive_if(cuda::arrives_for_warp(lane), address_of(shared + kFactorsThere + i % 2 * 8));
  };

  const int group = warp / kGroup;
  const int half = warp % kGroup;
  const int channel = group * (kGroup * kWarpChannels) + lane % 8 * 4;
  const bool exists = channel < item.channels;
  Mover<T> mine(o, piece, item.first + channel, exists, lane, group, thread);
  const unsigned cells_there = address_of(shared + kCellsThere + group * (8 * kSubs));
  const unsigned results_there = address_of(shared + kResultsThere + group * (8 * kSubs));
  // The last of the i-th tile's subs that this warp has.
  const auto last_of = [&](int i) { return kSubs - 2 + (half + i) % 2; };
  const auto token_of = [&](int i, int sub) { return (tiles - 1 - i) * kTile + sub * kSub + lane / 8; };
  typename Mover<T>::Elements here;  // of the sub that is finished next
  typename Mover<T>::Elements next;  // of the one that is prepared next
  const auto ask_next = [&](int i, int sub) {
    if (sub >= kSubs) sub = kSubs - 1 - last_of(i++);
    if (i < tiles) mine.ask(o, token_of(i, sub), next);
  };
  const auto put_cells = [&](int slot) {
    mine.prepare(next, shared, slot);
    __syncwarp();
    cuda::arrive_if(cuda::arrives_for_warp(lane), cells_there + static_cast<unsigned>(8 * slot));
  };
  // What has been summed of a part of the i-th tile, by half of the threads.
  const auto flush_part = [&](int i, int part) {
    if (warp / (kMovers / 32) != part) return;
    cuda::wait_for_phase(address_of(shared + kPartialsThere + 8 * part), static_cast<unsigned>(i % 2));
    flush(o, item, (tiles - 1 - i) * kTile + part * (kTile / kParts),
          shared + kPartials + part * kPartialPart, thread % kMovers);
    __syncwarp();
    cuda::arrive_if(cuda::arrives_for_warp(lane), address_of(shared + kPartialsRead + 8 * part));
  };
  // The state before the tile in front of the i-th one, towards the second-level cache.
  const auto prefetch_state = [&](int i) {
    constexpr int kLine = 32;  // floats
    const int tile = tiles - 2 - i;
    const int n = thread / (Shape::kChannels / kLine);
    const int at = thread % (Shape::kChannels / kLine) * kLine;
    if (tile < 0 || (tile == 0 && piece.part == 0) || n >= o.in.d_state || at >= item.channels) return;
    const float* const from = o.checkpoints + (piece.checkpoint + tile - 1) * o.checkpoint_size +
                              n * o.in.channels + item.first + at;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  };
  ask_next(0, half);
  put_factors(0);
  if (tiles > 0) {
    mine.ask(o, token_of(0, last_of(0)), here);
#pragma unroll 1
    for (int sub = half; sub < kSubs; sub += 2) {
      put_cells(sub);
      ask_next(0, sub + 2);
    }
  }
  put_factors(1);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const bool more = i + 1 < tiles;
    prefetch_state(i);
    if (i > 0) {
      flush_part(i - 1, 0);
      put_factors(i + 1);  // all have unwound the tile before this one
    }
#pragma unroll 1
    for (int sub = last_of(i); sub >= 0; sub -= 2) {
      if (sub < 2) flush_part(i, 1);
      const int slot = slot_of(sub, i);
      cuda::wait_for_phase(results_there + static_cast<unsigned>(8 * slot), static_cast<unsigned>(i % 2));
      mine.finish(o, token_of(i, sub), here, shared, slot);
      if (sub >= 2)
        mine.ask(o, token_of(i, sub - 2), here);
      else if (more)
        mine.ask(o, token_of(i + 1, last_of(i + 1)), here);
      if (!more) continue;
      put_cells(slot);
      ask_next(i + 1, kSubs - 1 - sub + 2);
    }
  }
  if (tiles > 0) flush_part(tiles - 1, 0);

  // Threads that have other tokens of a channel, one after the other.
  cuda::meet<kMovingThreads>();
  if (thread >= item.channels) return;
  constexpr int kWide = kGroup * kWarpChannels;
  const char* const from = shared + kTotals + thread / kWide * (kGroup * 32 * kTotal) +
                           thread % kWide / 4 * kTotal + thread % 4 * static_cast<int>(sizeof(float));
  const std::int64_t to = item.piece_index * o.in.channels + item.first + thread;
  for (int which = 0; which < 2; ++which) {
    float* const sums = which == 0 ? o.dD : o.ddelta_bias;
    if (sums == nullptr) continue;
    float sum = 0.0F;
    for (int other = 0; other < kGroup * 32; other += 8)
      sum += *reinterpret_cast<const float*>(from + other * kTotal + which * 16);
    sums[to] = sum;
  }
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) unwind_in_roles([[maybe_unused]] Operands o) {
#ifdef KRAIT_WGMMA
  extern __shared__ __align__(128) char shared[];
  const int thread = static_cast<int>(threadIdx.x);
  auto* const ticket = reinterpret_cast<int*>(shared + kTicket);
  if (thread == 0) {
    const auto begin = [&](int barrier, int i, int warps) {
      cuda::begin_barrier(address_of(shared + barrier + 8 * i), cuda::arrivals_of(warps));
    };
    for (int i = 0; i < kSubs * kGroups; ++i) {
      begin(kCellsThere, i, 1);
      begin(kResultsThere, i, kGroup);
    }
    for (int i = 0; i < 2; ++i) begin(kFactorsThere, i, kMovers / 32);
    for (int i = 0; i < kParts; ++i) {
      begin(kPartialsThere, i, kUnwindingWarps);
      begin(kPartialsRead, i, kMovers / 32);
    }
    cuda::fence_barriers();
    if (o.handed != nullptr) *ticket = atomicAdd(o.turns, 1);
  }
  __syncthreads();
  const Turn turn(o, *ticket);
  // There it costs no registers.
  auto& item = *reinterpret_cast<Item<Shape>*>(shared + kItem);
  if (thread == 0) item = Item<Shape>(o.in, o.pieces, turn.item);
  __syncthreads();
  if (thread < Shape::kChannels) {
    auto* const parameters = reinterpret_cast<float*>(shared + kParameters);
    const bool exists = thread < item.channels;
    parameters[thread] = exists && o.in.delta_bias ? o.in.delta_bias.load(item.first + thread) : 0.0F;
    parameters[Shape::kChannels + thread] = exists && o.in.D ? o.in.D.load(item.first + thread) : 0.0F;
  }
  if (thread < kMovingThreads)
    for (int i = 0; i < 2; ++i) reinterpret_cast<float4*>(shared + kTotals + thread * kTotal)[i] = {};
  __syncthreads();
  const int tiles = static_cast<int>((item.piece.count + kTile - 1) / kTile);
  // The same in all lanes, as the compiler sees.
  const int warp = __shfl_sync(0xffffffffU, thread / 32, 0);
  if (warp < kUnwindingWarps) {
    cuda::take_registers<kUnwindRegisters>();
    unwind_piece(o, item, turn, tiles, shared, warp);
  } else {
    cuda::give_registers<kMoveRegisters>();
    move_piece<T>(o, item, tiles, shared, thread - kUnwinders);
  }
#endif
}

}  // namespace
}  // namespace roles

bool fits_roles(const Context& ctx, const Problem& p, const Gradients& gradients) {
  const auto near = [&](int dim) { return std::abs(p.initial_state.stride(dim)) < kMostApart; };
  return cuda::has_warpgroup_products(ctx) && cuda::limits_of(ctx).shared_memory_per_block >= roles::kBytes &&
         (!p.initial_state || (near(1) && near(2))) &&
         has_channels_together(
             p, {&p.u, &p.delta, &p.z, &gradients.dout, &gradients.du, &gradients.ddelta, &gradients.dz});
}

void run_roles(Context& ctx, const UnwindOperands& unwind) {
  const roles::Operands o(unwind);
  const std::int64_t in_group = o.in.channels / o.in.groups;
  const std::int64_t items =
      o.pieces.count * o.in.groups * ((in_group + roles::Shape::kChannels - 1) / roles::Shape::kChannels);
  cuda::dispatch_element(o.in.u.dtype, "[selective_scan_backward] u", [&](auto t) {
    cuda::launch(ctx, "selective_scan_backward", roles::unwind_in_roles<decltype(t)>,
                 dim3(static_cast<unsigned>(items)), dim3(roles::kThreads), std::size_t{roles::kBytes}, o);
  });
}

}  // namespace krait::scan
