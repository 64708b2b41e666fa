// The backward of chunks on products of warpgroups. The maths is that of chunked_backward.cu; here the pairs
// are transposed, rows j of x against columns i of dy, so that M^T goes from registers into the product with
// dy. A block takes one chunk and, in turn, some heads of a group, 64 channels at a time. Four warpgroups
// share them, which hand on what they have by barriers in shared memory and are as far ahead of one another
// as stages allow:
//   prepare  one warp copies x, dy, S and G, one makes the steps of heads ready, two make <G, S> and finish
//   heads even     dM^T = x dy^T, M^T, v and dx of the even heads; the sum of W^T over them
//   (warpgroup_pairs.cuh) odd      the same of the odd heads states   dC, by dy S; dB, by x G
//   (warpgroup_sums.cuh)
// Rounded to 16 bits as operands are S, G, M with d, the sums of W, C B^T, and dy and x with the factors of
// their tokens where they are multiplied with states.
//
// What all warps run over and over has to stay within the instruction cache, some 32 KB: beyond that they
// wait for every line of it. So only loops over registers are unrolled.
#include <algorithm>
#include <optional>
#include <type_traits>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/meeting.cuh"
#include "ops/ssd/cuda/warpgroup_pairs.cuh"
#include "ops/ssd/cuda/warpgroup_sums.cuh"

namespace krait::ssd_detail {
namespace {

constexpr int kThreads = 4 * kGroup;
enum class Role { prepare, even, odd, states };

#ifdef KRAIT_WGMMA

// Of a thread, together what the launch has.
constexpr int kPrepareRegisters = 64;
constexpr int kPairsRegisters = 136;
constexpr int kStatesRegisters = 176;
// Without maps a warp copies rows, and says so when so many later items are under way.
constexpr int kAhead = kRowStages - 1;

// The chunk's tokens, 64 columns of each of which `inside` are there, by a warp.
template <typename T>
__device__ __forceinline__ void copy_strips(unsigned tile, const T* from, std::int64_t token_stride,
                                            std::int64_t inside, const Segments& chunks, const Segment& chunk,
                                            int lane) {
  const int vector = lane % 8;
#pragma unroll 2
  for (int row = lane / 8; row < kTokens; row += 4) {
    const int t = strip_at(row / 8) * 8 + row % 8;
    const bool there = vector * 8 < inside && t < chunk.count;
    copy_async(tile + Panels::offset(row, vector),
               there ? from + chunks.position(chunk, t) * token_stride + vector * 8 : from, there);
  }
}

template <typename T, int kN, bool kMaps>
__device__ __forceinline__ void copy_items(const Inputs& in, const Segments& chunks, const Work& work,
                                           const AnyView<4>& dout, const void* states, const void* gradients,
                                           const RowMaps& maps, unsigned base, const ChunkBarriers& barriers,
                                           int lane) {
  using At = ChunkLayout<kN>;
  const auto l = static_cast<int>(work.chunk.start);
  const auto b = static_cast<int>(work.chunk.row);
  const auto strips = [&](unsigned to, const CUtensorMap& map, int column, int of, unsigned barrier) {
#pragma unroll 1
    for (int place = 0; place < 8; ++place)
      cuda::copy_tile_async(to + static_cast<unsigned>(place * 1024), map, column, of,
                            l + strip_at(place) * 8, b, barrier);
  };
  const auto rows_of = [&](const AnyView<4>& view, std::int64_t of, std::int64_t column) {
    return static_cast<const T*>(view.data) + view.offset(work.chunk.row, 0, of, column);
  };
  if (kMaps && lane == 0) cuda::arrive_expecting(barriers.constants(), 2 * At::kOfN);
#pragma unroll
  for (int panel = 0; panel < kN / 64; ++panel) {
    const unsigned to = base + static_cast<unsigned>(panel * Panels::kPanel);
    if constexpr (kMaps) {
      if (lane == 0) {
        strips(to + At::B, maps.B, panel * 64, static_cast<int>(work.group), barriers.constants());
        strips(to + At::C, maps.C, panel * 64, static_cast<int>(work.group), barriers.constants());
      }
    } else {
      const std::int64_t inside = in.d_state - panel * 64;
      copy_strips(to + At::B, rows_of(in.B, work.group, panel * 64), in.B.stride[1], inside, chunks,
                  work.chunk, lane);
      copy_strips(to + At::C, rows_of(in.C, work.group, panel * 64), in.C.stride[1], inside, chunks,
                  work.chunk, lane);
    }
  }
  if constexpr (!kMaps) {
    cuda::commit_copies();
    cuda::wait_for_copies<0>();
    cuda::fence_shared();
    cuda::arrive(barriers.constants());
  }
  int arrived = 0;
  Item item(work);
#pragma unroll 1
  for (; item.exists(); item.next()) {
    const int row_stage = item.row_stage();
    const int state_stage = item.state_stage();
    const bool there = item.there();
    if (item.number >= kRowStages)
      cuda::wait_for_phase(barriers.rows_empty(row_stage), (item.number / kRowStages + 1) % 2);
    const unsigned rows = base + static_cast<unsigned>(At::rows + row_stage * At::row_stage);
    const int head = work.first_head + item.head;
    const int channel0 = item.tile * kChannels;
    if constexpr (kMaps) {
      if (lane == 0) {
        const unsigned full = barriers.rows_full(row_stage);
        cuda::arrive_expecting(full, there ? 2 * At::kOfP : 0);
        if (there) {
#pragma unroll 1
          for (int place = 0; place < 8; ++place) {
            const unsigned at = rows + static_cast<unsigned>(place * 1024);
            const int t = l + strip_at(place) * 8;
            cuda::copy_tile_async(at + At::x, maps.x, channel0, head, t, b, full);
            cuda::copy_tile_async(at + At::dy, maps.dout, channel0, head, t, b, full);
          }
        }
      }
    } else {
      if (there) {
        copy_strips(rows + At::x, rows_of(in.x, head, channel0), in.x.stride[1], kChannels, chunks,
                    work.chunk, lane);
        copy_strips(rows + At::dy, rows_of(dout, head, channel0), dout.stride[1], kChannels, chunks,
                    work.chunk, lane);
      }
      cuda::commit_copies();
    }
    if (item.number >= kStateStages)
      cuda::wait_for_phase(barriers.states_empty(state_stage), (item.number / kStateStages + 1) % 2);
    if (lane == 0) {
      const unsigned full = barriers.states_full(item.number);
      const unsigned to = base + static_cast<unsigned>(At::states + state_stage * At::state_stage);
      cuda::arrive_expecting(full, there ? 2 * At::kOfN : 0);
      if (there) {
        const std::int64_t image = ((work.s * in.heads + head) * item.tiles + item.tile) * At::kOfN;
        copy_in_async(to + At::S, static_cast<const char*>(states) + image, At::kOfN, full);
        copy_in_async(to + At::G, static_cast<const char*>(gradients) + image, At::kOfN, full);
      }
    }
    if constexpr (!kMaps) {
      if (item.number >= kAhead - 1) {
        cuda::wait_for_copies<kAhead - 1>();
        cuda::fence_shared();
        cuda::arrive(barriers.rows_full(arrived++ % kRowStages));
      }
    }
    __syncwarp();
  }
  if constexpr (!kMaps) {
    cuda::wait_for_copies<0>();
    cuda::fence_shared();
    for (; arrived < item.number; ++arrived) cuda::arrive(barriers.rows_full(arrived % kRowStages));
  }
}

// By a warp: the steps of the block's heads.
__device__ __forceinline__ void prepare_steps(const Inputs& in, const Segments& chunks, const Work& work,
                                              Values* slots, const ChunkBarriers& barriers, int lane) {
  unsigned dt[2] = {};
  std::int64_t of_token[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + i * 32;
    if (t < work.chunk.count) of_token[i] = in.dt.offset(work.chunk.row, chunks.position(work.chunk, t), 0);
  }
  const auto begin = [&](int k) {
    const int head = work.first_head + k;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (lane + i * 32 < work.chunk.count) dt[i] = load_bits(in.dt, of_token[i] + head * in.dt.stride[2]);
  };
  // Of 32 heads at a time, a lane each.
  float biases = 0.0F;
  float rates = 0.0F;
  float skips = 0.0F;
  if (work.heads > 0) begin(0);
#pragma unroll 1
  for (int k = 0; k < work.heads; ++k) {
    if (k % 32 == 0 && k + lane < work.heads) {
      const int head = work.first_head + k + lane;
      biases = bias_of(in, head);
      rates = rate_of(in, head);
      skips = in.D ? in.D.load(head, 0) : 0.0F;
    }
    const float bias = __shfl_sync(0xffffffffU, biases, k % 32);
    const float rate = __shfl_sync(0xffffffffU, rates, k % 32);
    const float skip = __shfl_sync(0xffffffffU, skips, k % 32);
    const int slot = k % kHeadSlots;
    if (k >= kHeadSlots) cuda::wait_for_phase(barriers.finished(slot), (k / kHeadSlots + 1) % 2);
    Values& values = slots[slot];
    const float given[2] = {value_of(dt[0], in.dt.dtype), value_of(dt[1], in.dt.dtype)};
    compute_steps</*kShort=*/true>(in, given, bias, rate, work.chunk.count, lane, values.steps);
    if (lane == 0) {
      values.D = skip;
      values.rate = rate;
    }
    __syncwarp();
    if (cuda::arrives_for_warp(lane)) cuda::arrive(barriers.steps(slot));
    if (k + 1 < work.heads) begin(k + 1);
  }
}
// Of every second head, those behind `which`. <G, S> is made while the other sums of the head are, so that
// its stage is soon free.
template <typename T, int kN>
__device__ __forceinline__ void finish_heads(const Inputs& in, const Segments& chunks, const Work& work,
                                             const Values* slots, const Gradients& to, const Sums& sums,
                                             unsigned base, const ChunkBarriers& barriers, int which,
                                             int lane) {
  using At = ChunkLayout<kN>;
  float through = 0.0F;
  float before = 0.0F;
  int unfinished = -1;
  std::int64_t of_token[2] = {};  // in ddt
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + i * 32;
    if (t < work.chunk.count) of_token[i] = to.ddt.offset(work.chunk.row, chunks.position(work.chunk, t), 0);
  }
#pragma unroll 1
  for (Item item(work, which);; item.next_of_head()) {
    const bool more = item.exists();
    if (more) {
      barriers.wait_for_states(item);
      if (item.there()) {
        const unsigned states =
            base + static_cast<unsigned>(At::states + item.state_stage() * At::state_stage);
        through += product_of_states<T, kN>(states + At::S, states + At::G, lane);
        __syncwarp();
      }
      if (cuda::arrives_for_warp(lane)) cuda::arrive(barriers.states_empty(item.state_stage()));
      if (!item.ends_head()) continue;
    }
    if (unfinished >= 0) {
      const int slot = unfinished % kHeadSlots;
      cuda::wait_for_phase(barriers.sums(slot), unfinished / kHeadSlots % 2);
      finish_head(in, work, work.first_head + unfinished, slots[slot], before, of_token, to, sums);
      __syncwarp();
      if (cuda::arrives_for_warp(lane)) cuda::arrive(barriers.finished(slot));
    }
    if (!more) break;
    before = cuda::warp_sum(through);
    through = 0.0F;
    unfinished = item.there() ? item.head : -1;
  }
}

#endif

template <typename T, int kN, bool kMaps>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_backward_kernel(Inputs in, Segments chunks, AnyView<4> dout, const void* states,
                              const void* gradients, Gradients to, Sums sums,
                              const __grid_constant__ RowMaps maps) {
#ifdef KRAIT_WGMMA
  using At = ChunkLayout<kN>;
  extern __shared__ __align__(1024) float4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  const unsigned base = shared_address(shared_memory);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Role role = static_cast<Role>(__shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kGroup, 0));
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) % kGroup / 32, 0);
  const ChunkBarriers barriers{base + At::barriers};
  Work& work = *reinterpret_cast<Work*>(shared + At::work);
  if (threadIdx.x == 0) {
    barriers.begin(kMaps ? 1 : 32);
    work = Work(in, chunks, sums.parts);
  }
  __syncthreads();
  // Of the warpgroups with sums, at the end: the sums of W^T are there.
  const auto meet = [] { cuda::meet<3 * kGroup>(); };

  if (role == Role::prepare) {
    cuda::give_registers<kPrepareRegisters>();
    Values* const slots = reinterpret_cast<Values*>(shared + At::values);
    if (warp == 0)
      copy_items<T, kN, kMaps>(in, chunks, work, dout, states, gradients, maps, base, barriers, lane);
    else if (warp == 1)
      prepare_steps(in, chunks, work, slots, barriers, lane);
    else
      finish_heads<T, kN>(in, chunks, work, slots, to, sums, base, barriers, warp - 2, lane);
  } else if (role == Role::states) {
    cuda::take_registers<kStatesRegisters>();
    states_of_chunk<T, kN>(in, chunks, work, to, sums, shared, base, barriers, warp, lane, meet);
  } else {
    cuda::take_registers<kPairsRegisters>();
    pairs_of_chunk<T, kN, kMaps>(chunks, work, to, maps, shared, base, barriers, role == Role::odd ? 1 : 0,
                                 warp, lane);
    meet();
  }
#endif
}

std::optional<RowMaps> describe_inputs(const Segments& chunks, const BackwardProblem& b) {
  if (chunks.listed != nullptr || chunks.reverse) return std::nullopt;
  const auto x = cuda::describe_tiles(b.forward.x, 8);
  const auto dout = cuda::describe_tiles(b.dout, 8);
  const auto B = cuda::describe_tiles(b.forward.B, 8);
  const auto C = cuda::describe_tiles(b.forward.C, 8);
  const auto dx = cuda::describe_tiles(b.dx ? b.dx : b.dout, 8);
  if (!x || !dout || !B || !C || !dx) return std::nullopt;
  return RowMaps{*x, *dout, *B, *C, *dx};
}

}  // namespace

std::int64_t warpgroup_columns(std::int64_t d_state) { return d_state <= 64 ? 64 : 128; }

int warpgroup_backward_shared_memory() { return ChunkLayout<128>::total; }

void warpgroup_backward(Context& ctx, const Inputs& in, const Segments& chunks, const BackwardProblem& b,
                        const StateTiles& tiles, const Gradients& to, const Sums& sums) {
  const std::int64_t blocks = chunks.count * in.groups * sums.parts;
  if (blocks == 0) return;
  const std::optional<RowMaps> maps = describe_inputs(chunks, b);
  cuda::dispatch_element(in.x.dtype, "[ssd_backward] x", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto launch = [&](auto of_state) {
        constexpr int kN = decltype(of_state)::value;
        cuda::launch(ctx, "ssd_backward chunks",
                     maps ? warpgroup_backward_kernel<T, kN, true> : warpgroup_backward_kernel<T, kN, false>,
                     static_cast<unsigned>(blocks), kThreads,
                     static_cast<std::size_t>(ChunkLayout<kN>::total), in, chunks, AnyView<4>(b.dout),
                     static_cast<const void*>(tiles.states.raw()),
                     static_cast<const void*>(tiles.gradients.raw()), to, sums, maps.value_or(RowMaps{}));
      };
      in.d_state <= 64 ? launch(std::integral_constant<int, 64>())
                       : launch(std::integral_constant<int, 128>());
    }
  });
}

}  // namespace krait::ssd_detail
