// The chunked forward with products of warpgroups (compute capability 9.0a): one launch of blocks that stay,
// each with its share of all chunks (parts.h). A block works on two tiles of 64 channels of one group of
// heads at a time, one in each of two warpgroups, with the state in f32 in the registers that its product
// accumulates in; a third warpgroup brings x, B and C of the chunks that come next, sums the exponents and
// makes C B^T, once for both tiles.
//
// Outputs are formed transposed, channels by tokens, so that left operands come from registers:
//   y^T = (S C^T) exp(a_i) + x^T M^T,   M_ij = (C_i . B_j) exp(a_i - a_j) d_j for j <= i
//   S  <- exp(a_63) S + (d x exp(a_63 - a))^T B
// Rounded to 16 bits are: the state as operand, C B^T, M, and d x with its factor.
#include <type_traits>

#include "ops/ssd/cuda/persistent_consumer.cuh"
#include "ops/ssd/cuda/persistent_producer.cuh"

namespace krait::ssd_detail {
namespace {

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    persistent_kernel(Inputs in, Segments chunks, Division division, Exchange exchange, AnyView<4> out,
                      AnyView<4> final_states) {
#ifdef KRAIT_WGMMA
  using At = Layout<kN>;
  extern __shared__ __align__(1024) float4 shared_memory[];
  char* const memory = reinterpret_cast<char*>(shared_memory);
  const unsigned shared = shared_address(shared_memory);
  const Barriers barriers{shared + At::barriers};
  unsigned* const number = reinterpret_cast<unsigned*>(memory + At::barriers + 120);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      cuda::begin_barrier(barriers.full(stage), kWarpgroup);
      cuda::begin_barrier(barriers.empty(stage), 8);  // warps
    }
    cuda::begin_barrier(barriers.pairs_free(), 8);
    cuda::fence_barriers();
    // Blocks in the order in which they begin: those before one are running or done.
    *number = atomicAdd(exchange.ticket, 1U);
  }
  __syncthreads();
  const auto block = __shfl_sync(0xffffffffU, static_cast<int>(*number), 0);
  const Parts<FirstChunk> parts(division, FirstChunk{chunks.first_of_run, static_cast<int>(chunks.per_run)},
                                block);
  // A block begins with 168 registers a thread, and a warpgroup waits for ever for more than others give
  // back: 88 + 2 * 208 = 3 * 168.
  if (__shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kWarpgroup, 0) == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 88;\n");
    produce<T, kN>(in, chunks, parts, memory, shared, barriers);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;\n");
    Consumer<T, kN> consumer;
    consumer.run(in, chunks, parts, block, exchange, out, final_states, memory, shared, barriers);
  }
#endif
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
  const Tensor flags = ctx.empty({blocks * 2 + 1}, DType::i32);
  ctx.fill(flags, 0.0);
  auto* const words = static_cast<unsigned*>(flags.raw());
  const Exchange exchange{.states = reinterpret_cast<float4*>(states.data<float>()),
                          .decays = decays.data<float>(),
                          .flags = words,
                          .ticket = words + blocks * 2};
  cuda::dispatch_element(in.x.dtype, "[ssd] x", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto with = [&](auto kernel, int shared) {
        cuda::launch(ctx, "ssd chunks", kernel, static_cast<unsigned>(blocks), kThreads,
                     static_cast<std::size_t>(shared), in, chunks, division, exchange, AnyView<4>(p.out),
                     AnyView<4>(p.final_states));
      };
      if (columns == 64)
        with(persistent_kernel<T, 64>, Layout<64>::total);
      else
        with(persistent_kernel<T, 128>, Layout<128>::total);
    }
  });
}

}  // namespace krait::ssd_detail
