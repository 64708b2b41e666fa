// The kernels of state_update. What they move is the state, once in and once out; everything else of a token
// is small beside it.
#include <algorithm>
#include <cstdint>

#include "core/cuda/overlap.cuh"
#include "ops/state_update/cuda/operands.cuh"

namespace krait::update {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;

// Any layout: a warp for each channel, its lanes over the states.
__global__ void __launch_bounds__(kThreads) walk_channels(Operands o) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t channels = o.batch * o.heads * o.headdim;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < channels;
       i += std::int64_t{gridDim.x} * kWarps) {
    const std::int64_t p = i % o.headdim;
    const std::int64_t h = i / o.headdim % o.heads;
    const std::int64_t b = i / (o.headdim * o.heads);
    const std::int64_t g = h / o.heads_per_group;
    const std::int64_t row = o.row_of(b);
    for (std::int64_t t = 0; t < o.tokens; ++t) {
      if (row < 0) {
        if (lane == 0) o.out.store(0.0F, b, t, h, p);
        continue;
      }
      const float step = o.step_of(b, t, h, p);
      const float input = o.x.load(b, t, h, p);
      float y = 0.0F;
      for (std::int64_t n = lane; n < o.d_state; n += kWarp) {
        const float next = advance(expf(step * o.A.load(h, p, n)), o.state.load(row, h, p, n), step * input,
                                   o.B.load(b, t, g, n));
        y += next * o.C.load(b, t, g, n);
        o.state.store(next, row, h, p, n);
      }
      y = cuda::warp_sum(y);
      if (lane == 0) o.finish(b, t, h, p, input, y);
    }
  }
}

struct VectorPlan {
  int lanes = 1;  // of a channel, each with 16 bytes of states: a power of two up to 32
  bool packed_b = false;
  bool packed_c = false;
  bool one_step = false;  // all channels of a head share dt, its bias and A
};

// States side by side. A block takes (kThreads / lanes) kChannels channels of one head: a lane holds 16 bytes
// of states of kChannels channels, with all loads of state under way before the first is used, and reads B
// and C once for them. kDecayPerState: A differs from state to state (f32, packed).
template <typename State, bool kDecayPerState, int kChannels>
__global__ void __launch_bounds__(kThreads, kDecayPerState ? 3 : 5)
    update_vectors(Operands o, VectorPlan plan) {
  cuda::let_next_start();
  constexpr int kStates = 16 / static_cast<int>(sizeof(State));
  const int lane = static_cast<int>(threadIdx.x) % plan.lanes;
  const int teams = kThreads / plan.lanes;
  const int team = static_cast<int>(threadIdx.x) / plan.lanes;
  const std::int64_t tiles = (o.headdim + teams * kChannels - 1) / (teams * kChannels);
  const std::int64_t tile = blockIdx.x % tiles;
  const std::int64_t h = blockIdx.x / tiles % o.heads;
  const std::int64_t b = blockIdx.x / (tiles * o.heads);
  const std::int64_t g = h / o.heads_per_group;
  const std::int64_t row = o.row_of(b);
  const std::int64_t first = tile * teams * kChannels + team;
  const auto channel = [&](int i) { return first + std::int64_t{i} * teams; };

  if (row < 0) {
    cuda::wait_for_previous();
    for (int i = 0; i < kChannels; ++i)
      for (std::int64_t t = 0; t < o.tokens; ++t)
        if (lane == 0 && channel(i) < o.headdim) o.out.store(0.0F, b, t, h, channel(i));
    return;
  }

  using Vector = Packed<State, kStates>;
  auto* const states = static_cast<State*>(o.state.data);
  const std::int64_t n = std::int64_t{lane} * kStates;
  // Lanes beyond the last channel repeat it, so that all take part in the sums.
  const auto channel_or_last = [&](int i) { return channel(i) < o.headdim ? channel(i) : o.headdim - 1; };
#pragma unroll
  for (int i = 0; i < kChannels; ++i) cuda::prefetch(states + o.state.offset(row, h, channel_or_last(i), n));
  constexpr int kDecays = kDecayPerState ? kStates : 1;
  cuda::Bits<kDecays> A[kChannels];
  std::uint32_t bias[kChannels];
  std::uint32_t skip[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const std::int64_t p = channel_or_last(i);
    if constexpr (kDecayPerState)
      A[i].load_packed(o.A.data, DType::f32, o.A.offset(h, p, n));
    else
      A[i].word[0] = bits_of(o.A, h, p, 0);
    bias[i] = bits_of(o.dt_bias, h, p);
    skip[i] = bits_of(o.D, h, p);
  }
  cuda::wait_for_previous();
  // All loads are on their way before the first of them is looked at.
  Vector loaded[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i)
    loaded[i] = *reinterpret_cast<const Vector*>(states + o.state.offset(row, h, channel_or_last(i), n));
  for (std::int64_t t = 0; t < o.tokens; ++t) {
    const cuda::Bits<kStates> B_bits = load_factor<kStates>(o.B, o.B.offset(b, t, g, n), plan.packed_b);
    const cuda::Bits<kStates> C_bits = load_factor<kStates>(o.C, o.C.offset(b, t, g, n), plan.packed_c);
    std::uint32_t x[kChannels];
    std::uint32_t dt[kChannels];
    std::uint32_t z[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const std::int64_t p = channel_or_last(i);
      x[i] = bits_of(o.x, b, t, h, p);
      dt[i] = bits_of(o.dt, b, t, h, p);
      z[i] = bits_of(o.z, b, t, h, p);
    }
    float B[kStates];
    float C[kStates];
    B_bits.to_floats(o.B.dtype, B);
    C_bits.to_floats(o.C.dtype, C);
    float step = 0.0F;
    float decay[kStates];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const float input = cuda::float_of(x[i], o.x.dtype);
      const bool anew = i == 0 || !plan.one_step;
      if (anew) {
        step = o.limited(cuda::float_of(dt[i], o.dt.dtype) + cuda::float_of(bias[i], o.dt_bias.dtype));
      }
      if constexpr (kDecayPerState) {
#pragma unroll
        for (int j = 0; j < kStates; ++j) decay[j] = exp2_fast(step * kLog2E * __uint_as_float(A[i].word[j]));
      } else if (anew) {
        const float common = expf(step * cuda::float_of(A[i].word[0], o.A.dtype));
#pragma unroll
        for (int j = 0; j < kStates; ++j) decay[j] = common;
      }
      float y = 0.0F;
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        const float next = advance(decay[j], cuda::to_float(loaded[i].v[j]), step * input, B[j]);
        y = fmaf(next, C[j], y);
        loaded[i].v[j] = cuda::from_float<State>(next);
      }
      for (int apart = plan.lanes / 2; apart > 0; apart /= 2) y += __shfl_xor_sync(0xffffffffU, y, apart);
      if (o.D) y = fmaf(cuda::float_of(skip[i], o.D.dtype), input, y);
      if (o.z) y *= cuda::silu(cuda::float_of(z[i], o.z.dtype));
      if (lane == 0 && channel(i) < o.headdim) o.out.store(y, b, t, h, channel(i));
    }
  }

#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (channel(i) < o.headdim)
      *reinterpret_cast<Vector*>(states + o.state.offset(row, h, channel(i), n)) = loaded[i];
  }
}

template <typename State, bool kDecayPerState, int kChannels>
void launch_vectors(Context& ctx, const Problem& p, const VectorPlan& plan) {
  const std::int64_t block = std::int64_t{kThreads / plan.lanes} * kChannels;
  const std::int64_t blocks = (p.headdim + block - 1) / block * p.heads * p.batch();
  cuda::launch_overlapping(ctx, "state_update", update_vectors<State, kDecayPerState, kChannels>,
                           dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, Operands(p), plan);
}

template <typename State>
void run_vectors(Context& ctx, const Problem& p) {
  constexpr int kStates = 16 / static_cast<int>(sizeof(State));
  VectorPlan plan = {.lanes = static_cast<int>(p.d_state) / kStates,
                     .packed_b = in_pieces(p.B, kStates),
                     .packed_c = in_pieces(p.C, kStates)};
  const bool decay_per_state = p.A.stride(2) != 0;
  plan.one_step = p.dt.stride(3) == 0 && (!p.dt_bias || p.dt_bias.stride(1) == 0) && p.A.stride(1) == 0;
  // Few channels spread over as many multiprocessors as there are.
  const std::int64_t blocks_of_four = p.batch() * p.heads * p.headdim * plan.lanes / (4 * kThreads);
  const bool four = blocks_of_four >= cuda::limits_of(ctx).multiprocessors;
  if (decay_per_state)
    four ? launch_vectors<State, true, 4>(ctx, p, plan) : launch_vectors<State, true, 1>(ctx, p, plan);
  else
    four ? launch_vectors<State, false, 4>(ctx, p, plan) : launch_vectors<State, false, 1>(ctx, p, plan);
}

}  // namespace

void run_cuda(Context& ctx, const Problem& p) {
  const std::int64_t channels = p.batch() * p.heads * p.headdim;
  if (channels == 0 || p.tokens == 0) return;
  if (fits_vectors(p)) {
    if (run_stream(ctx, p)) return;
    cuda::dispatch_element(p.state.dtype(), "[state_update] state",
                           [&](auto element) { run_vectors<decltype(element)>(ctx, p); });
    return;
  }
  cuda::launch(ctx, "state_update_plain", walk_channels,
               dim3(cuda::blocks_for(ctx, channels * kWarp, kThreads)), dim3(kThreads), 0, Operands(p));
}

}  // namespace krait::update
