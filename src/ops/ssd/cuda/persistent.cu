// The chunked forward with products of warpgroups (compute capability 9.0a): one launch of blocks that stay,
// each with its share of all chunks (parts.h). A block works on two tiles of 64 channels of one group of
// heads at a time, one in each of two warpgroups, with the state in f32 in the registers that its product
// accumulates in. A third one makes C B^T of the chunks that come next, once for both tiles; of a fourth one
// warp brings x, B and C, two sum the exponents, and one takes outputs away.
//
// Outputs are formed transposed, channels by tokens, so that left operands come from registers:
//   y^T = (S C^T + x'^T K^T) exp(a_i),   x'_j = d_j exp(-a_j) x_j,   K_ij = C_i . B_j for j <= i, else 0
//   S  <- exp(a_63) (S + x'^T B)
// where exp(-a_63) is not too large for x', and
//   y^T = (S C^T) exp(a_i) + x^T M^T,    M_ij = (C_i . B_j) exp(a_i - a_j) d_j for j <= i
//   S  <- exp(a_63) S + (d x exp(a_63 - a))^T B
// where it is. S is multiplied by exp(a_63) of several chunks at once (Factors). Rounded to 16 bits are: the
// state as operand, C B^T, d x with its factor, and M.
#include <optional>
#include <type_traits>

#include "ops/overlap.h"
#include "ops/ssd/cuda/persistent_consumer.cuh"
#include "ops/ssd/cuda/persistent_producer.cuh"

namespace krait::ssd_detail {
namespace {

#ifdef KRAIT_WGMMA
// Chunks at the beginning of a part for the state alone that leave nothing at its end: the factors of what
// comes after them are 0 together. By all threads; `sums` has a float for each warp.
__device__ int forgotten_chunks(const Inputs& in, const Segments& chunks, const Part& part, float* sums) {
  constexpr float kNothing = -150.0F;  // in powers of two
  constexpr int kAtOnce = kThreads / 64;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const TileOf tile(in, part.pair, warp % 2);
  float total[2] = {};
  for (int end = part.count; end > 0; end -= kAtOnce) {
    const int own = end - 1 - warp / 2;
    float sum = 0.0F;
    if (own >= 0) {
      const Segment chunk = chunks.of_run(part.run, part.begin + own);
      for (std::int64_t t = lane; t < chunk.count; t += 32) {
        const float exponent = step_of(in, chunk.row, chunks.position(chunk, t), tile.head).exponent;
        sum += exponent < kLeastExponent ? kLeastExponent : exponent;
      }
    }
    sum = cuda::warp_sum(sum);
    if (lane == 0) sums[warp] = sum * kLog2E;
    __syncthreads();
    for (int i = 0; i < kAtOnce; ++i) {
      total[0] += sums[2 * i];
      total[1] += sums[2 * i + 1];
      if (total[0] < kNothing && total[1] < kNothing) return max(end - 1 - i, 0);
    }
    __syncthreads();
  }
  return 0;
}
#endif

template <typename T, int kN, bool kMaps>
__global__ void __launch_bounds__(kThreads, 1)
    persistent_kernel(Inputs in, Segments chunks, Division division, Exchange exchange, AnyView<4> out,
                      AnyView<4> final_states, const __grid_constant__ Maps maps) {
#ifdef KRAIT_WGMMA
  using At = Layout<kN>;
  extern __shared__ __align__(1024) float4 shared_memory[];
  char* const memory = reinterpret_cast<char*>(shared_memory);
  const unsigned shared = shared_address(shared_memory);
  const Barriers barriers{shared + At::barriers};
  unsigned* const number = reinterpret_cast<unsigned*>(memory + At::number);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      cuda::begin_barrier(barriers.loaded(stage), kMaps ? 1 : cuda::arrivals_of(kCopyingWarps));
      cuda::begin_barrier(barriers.factored(stage), cuda::arrivals_of(2));
      cuda::begin_barrier(barriers.paired(stage), cuda::arrivals_of(kWarps));
      cuda::begin_barrier(barriers.empty(stage), cuda::arrivals_of(2 * kWarps));
      cuda::begin_barrier(barriers.written(stage), cuda::arrivals_of(2 * kWarps));
      cuda::begin_barrier(barriers.stored(stage), kMaps ? 1 : cuda::arrivals_of(2 * kWarps));
    }
    cuda::fence_barriers();
    // Blocks in the order in which they begin: those before one are running or done.
    *number = atomicAdd(exchange.ticket, 1U);
  }
  for (int i = static_cast<int>(threadIdx.x) * 16; i < 2 * kTile; i += kThreads * 16)
    *reinterpret_cast<uint4*>(memory + At::pairs + i) = make_uint4(0, 0, 0, 0);
  cuda::fence_shared();
  __syncthreads();
  const auto block = __shfl_sync(0xffffffffU, static_cast<int>(*number), 0);
  Parts<FirstChunk> parts(division, FirstChunk{chunks.first_of_run, static_cast<int>(chunks.per_run)}, block);
  // Of fewer chunks it is not worth to find out.
  constexpr int kShort = 16;
  Part part;
  Parts<FirstChunk> ahead = parts;
  if (ahead.next(part) && !part.outputs && part.count > kShort) {
    parts.skip(forgotten_chunks(in, chunks, part, reinterpret_cast<float*>(memory + At::factors)));
    __syncthreads();
  }
  // A block begins with 128 registers a thread, and a warpgroup waits for ever for more than others give
  // back: 40 + 72 + 2 * 200 = 4 * 128.
  const int warpgroup = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (warpgroup == 0) {
    cuda::give_registers<40>();
    const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 1 || warp == 2)
      prepare_factors<T>(in, chunks, parts, warp - 1, memory + At::factors, barriers);
    else if constexpr (!kMaps)
      copy_rows<T, kN>(in, chunks, parts, warp / 2, shared, barriers);
    else if (threadIdx.x == 0)
      copy_tiles<kN>(in, chunks, parts, maps, shared, barriers);
    else if (threadIdx.x == 3 * 32)
      store_tiles<kN>(in, chunks, parts, maps, shared, barriers);
  } else if (warpgroup == 1) {
    cuda::give_registers<72>();
    multiply_pairs<T, kN>(parts, shared, barriers);
  } else {
    cuda::take_registers<200>();
    Consumer<T, kN, kMaps> consumer;
    consumer.run(in, chunks, parts, block, exchange, out, final_states, memory, shared, barriers);
  }
#endif
}

std::optional<Maps> describe_tensors(const Segments& chunks, const Problem& p) {
  if (chunks.listed != nullptr || chunks.reverse) return std::nullopt;
  const auto x = cuda::describe_tiles(p.x, kTokens);
  const auto B = cuda::describe_tiles(p.B, kTokens);
  const auto C = cuda::describe_tiles(p.C, kTokens);
  const auto out = cuda::describe_tiles(p.out, kTokens);
  if (!x || !B || !C || !out) return std::nullopt;
  return Maps{*x, *B, *C, *out};
}

}  // namespace

void persistent_outputs(Context& ctx, const Inputs& in, const Segments& chunks, std::int64_t blocks,
                        const Problem& p) {
  const std::int64_t pairs = in.groups * ((in.heads_per_group * (in.headdim / kChannels) + 1) / 2);
  const Division division{.total = static_cast<int>(chunks.count * pairs),
                          .pairs = static_cast<int>(pairs),
                          .runs = static_cast<int>(chunks.runs),
                          .blocks = static_cast<int>(blocks)};
  if (division.total == 0) return;
  const std::int64_t columns = in.d_state <= 64 ? 64 : 128;
  const Tensor states = ctx.empty({blocks, 2, kChannels, columns});
  const Tensor decays = ctx.empty({blocks, 2});
  const Tensor flags = ctx.empty({blocks * 4 + 1}, DType::i32);
  ctx.fill(flags, 0.0);
  auto* const words = static_cast<unsigned*>(flags.raw());
  const bool replaces = same_view(p.final_states, p.initial_states);
  const Exchange exchange{.states = reinterpret_cast<float4*>(states.data<float>()),
                          .decays = decays.data<float>(),
                          .there = words,
                          .begun = replaces ? words + blocks * 2 : nullptr,
                          .ticket = words + blocks * 4};
  const std::optional<Maps> maps = describe_tensors(chunks, p);
  cuda::dispatch_element(in.x.dtype, "[ssd] x", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto with = [&](auto kernel, int shared) {
        cuda::launch(ctx, "ssd chunks", kernel, static_cast<unsigned>(blocks), kThreads,
                     static_cast<std::size_t>(shared), in, chunks, division, exchange, AnyView<4>(p.out),
                     AnyView<4>(p.final_states), maps.value_or(Maps{}));
      };
      const auto launch = [&](auto of_state) {
        constexpr int kN = decltype(of_state)::value;
        with(maps ? persistent_kernel<T, kN, true> : persistent_kernel<T, kN, false>, Layout<kN>::total);
      };
      columns == 64 ? launch(std::integral_constant<int, 64>()) : launch(std::integral_constant<int, 128>());
    }
  });
}

}  // namespace krait::ssd_detail
