// The kernel around the mixers: one block for each multiprocessor, all of them at once, which pass results to
// one another as words (words.cuh). Eight warps compute; the ninth brings what they need (ring.cuh), layers
// ahead of them where the ring has room, so that the memory stays busy while results pass.
//
// A mixer brings all tiles of a layer in the order of use (bring), and takes a layer from what the one in
// front has published to what it publishes itself (step).
#pragma once

#include "core/cuda/wgmma.cuh"
#include "ops/decode_step/cuda/layer.cuh"

namespace krait::decode_detail {

// Registers move between groups of four warps: of the last group one works, with few.
inline constexpr int kBringers = 128;

template <typename T, int kSteps, template <typename, int> class Mixer>
__global__ void __launch_bounds__(kThreads + kBringers, 1) decode(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ __align__(16) float scratch[2 * kMostGroups * kWarps];
  __shared__ std::uint64_t barriers[2 * kSlots];
  const int block = static_cast<int>(blockIdx.x);
  const int blocks = static_cast<int>(gridDim.x);
  const unsigned before = *p.epoch;
  const Ring ring(static_cast<unsigned>(__cvta_generic_to_shared(memory)),
                  static_cast<unsigned>(__cvta_generic_to_shared(barriers)), p.ring, p.piece_shift);
  if (threadIdx.x == 0) ring.begin();
  __syncthreads();

  const Share head = share_of(p.vocabulary, block, blocks);
  if (threadIdx.x >= kThreads) {
#ifdef KRAIT_WGMMA
    cuda::give_registers<40>();
#endif
    if (threadIdx.x >= kThreads + 32) return;
    Producer producer(ring, p.in_flight);
    for (int l = 0; l < p.layers; ++l) Mixer<T, kSteps>::bring(p, p.layer[l], producer, block, blocks);
    producer.bring_rows<T>(p.head, p.d_model, head.first, head.count, p.model_tile);
    return;
  }

#ifdef KRAIT_WGMMA
  cuda::take_registers<232>();
#endif
  // Behind the ring: the staged vector, sums, and what x_proj gave.
  const auto x = static_cast<unsigned>(p.ring);
  const unsigned sums =
      x + kWarps * kStep * sizeof(T) * static_cast<unsigned>(max(p.model_steps, p.inner_steps));
  const unsigned low = sums + 4U * 2 * kWarps * kMostRows;
  const Shared shared{.x = ring.memory() + x,
                      .sums = ring.memory() + sums,
                      .scratch = static_cast<unsigned>(__cvta_generic_to_shared(scratch)),
                      .low = ring.memory() + low,
                      .ring = memory};
  Computer<T, kSteps> computer(p, shared, ring);
  constexpr int kQuads = Computer<T, kSteps>::kQuads;
  const Part part = computer.model_part();
  Mixer<T, kSteps> mixer(computer, block, blocks);
  float residual[kQuads][4] = {};
  for (int l = 0; l < p.layers; ++l) mixer.step(l, before + static_cast<unsigned>(l), part, residual);

  float4 weight[kQuads];
  computer.load_weight(p.norm_weight, part, weight);
  uint2 came[kQuads];
  const unsigned last = before + static_cast<unsigned>(p.layers);
  read_pairs(p.words.hidden + part.first / 2, part.quads, last, came);
  computer.stage_norm(part, p.norm_bias, weight, came, residual);
  // All blocks have read the old one: something of all of them has arrived here.
  if (block == 0 && threadIdx.x == 0) *p.epoch = last;
  computer.template multiply_model</*kOnePass=*/false>(head.count, [&](int i, bool there, float sum) {
    if (there) p.logits[head.first + i] = sum;
  });
#endif
}

// What kernels know beforehand of a model with d_model 256 x steps.
inline bool is_known(const DecodePlan& plan, const Params& p, int steps) {
  bool known = p.d_model == steps * kWarps * kStep && p.d_inner == 2 * p.d_model && p.rms && p.groups == 1 &&
               !p.norm_before_gate && !p.D_by_channel && !p.mixer_norm && p.gated_norm == (p.heads > 0) &&
               p.state_dtype == DType::f32 && p.norm_weight != nullptr && p.norm_bias == nullptr;
  known = known && (p.heads > 0 ? p.d_state == kKnownStates && p.headdim == kKnownHeaddim
                                : p.d_state == kKnownLowStates && p.dt_rank == steps * kKnownRankOfStep);
  // A block's rows of each product, and states of its channels, at once.
  known = known && p.in_rows <= plan.blocks * (kMostRows - 2) &&
          (p.heads == 0 || p.d_inner <= plan.blocks * (p.state_tile - 2));
  for (int l = 0; l < p.layers; ++l) {
    const LayerPointers& layer = p.layer[l];
    known = known && layer.norm_weight != nullptr && layer.norm_bias == nullptr && layer.in_bias == nullptr &&
            layer.conv_bias != nullptr && layer.dt_bias != nullptr && layer.D != nullptr &&
            (!p.gated_norm || layer.gated_norm_weight != nullptr) && layer.out_bias == nullptr;
  }
  return known;
}

template <template <typename, int> class Mixer>
void launch_decode(Context& ctx, DType dtype, const DecodePlan& plan, const Params& params) {
  const auto launch = [&](const auto kernel) {
    cuda::launch_together(ctx, "decode_step", kernel, dim3(static_cast<unsigned>(plan.blocks)),
                          dim3(kThreads + kBringers), static_cast<std::size_t>(plan.shared), params);
  };
  // The sizes that are published; the last one takes every model.
  const auto launch_for = [&](auto element) {
    using T = decltype(element);
    const auto known = [&](int steps) { return is_known(plan, params, steps); };
    known(3)    ? launch(decode<T, 3, Mixer>)
    : known(4)  ? launch(decode<T, 4, Mixer>)
    : known(6)  ? launch(decode<T, 6, Mixer>)
    : known(8)  ? launch(decode<T, 8, Mixer>)
    : known(10) ? launch(decode<T, 10, Mixer>)
                : launch(decode<T, 0, Mixer>);
  };
  dtype == DType::f16 ? launch_for(__half{}) : launch_for(__nv_bfloat16{});
}

}  // namespace krait::decode_detail
