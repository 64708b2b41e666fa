// Many states, one token each: a pass over memory. A block walks over tiles of channels, and the states of
// its next tiles are on their way to shared memory while it works on one, so that the memory never waits for
// arithmetic. A thread reads only what it has copied itself: there are no barriers.
#include <algorithm>

#include "core/cuda/async_copy.cuh"
#include "ops/state_update/cuda/operands.cuh"

namespace krait::update {
namespace {

constexpr unsigned kAll = 0xffffffffU;
constexpr int kThreads = kStreamThreads;
constexpr int kStages = 2;  // tiles in shared memory: one in turn, one on its way

// Which tile of channels of which head of which entry of the batch, in the order of memory. Blocks step over
// one another's tiles, so that all of them work in one stretch of it.
struct Place {
  int b;
  int h;
  int tile;

  __device__ static Place of(std::int64_t item, int heads, int tiles) {
    return {static_cast<int>(item / (std::int64_t{heads} * tiles)), static_cast<int>(item / tiles % heads),
            static_cast<int>(item % tiles)};
  }
  __device__ __forceinline__ void advance(const Place& step, int heads, int tiles) {
    tile += step.tile;
    int carry = tile >= tiles ? 1 : 0;
    tile -= carry * tiles;
    h += step.h + carry;
    carry = h >= heads ? 1 : 0;
    h -= carry * heads;
    b += step.b + carry;
  }
};

// Sums over kLanes neighbours of kValues values each: the lanes first share out the values, then each sums
// what it has. v[0 .. kValues / kLanes) are the sums of values place * kOwned + j; see Owned.
template <int kLanes, int kValues>
__device__ __forceinline__ void sum_over_lanes(float (&v)[kValues], int at) {
  int count = kValues;
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = (at & half) != 0;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float sent = upper ? v[i] : v[i + count];
        const float kept = upper ? v[i + count] : v[i];
        v[i] = kept + __shfl_xor_sync(kAll, sent, half);
      }
    } else {
      v[0] += __shfl_xor_sync(kAll, v[0], half);
    }
  }
}

// The channels whose inputs and outputs a lane takes care of, of the kChannels that its team works on.
template <int kLanes, int kChannels>
struct Owned {
  static constexpr int kCount = kChannels > kLanes ? kChannels / kLanes : 1;
  static constexpr int kShare = kLanes > kChannels ? kLanes / kChannels : 1;  // lanes that own the same one
  static __device__ __forceinline__ int channel(int at, int j) { return at / kShare * kCount + j; }
  static __device__ __forceinline__ int lane_of(int i) { return i / kCount * kShare; }
};

template <typename State, int kLanes, bool kDecayPerState>
__global__ void __launch_bounds__(kThreads, stream_blocks(sizeof(State), kDecayPerState))
    stream_states(const __grid_constant__ Operands o, int tiles, std::int64_t items, bool packed_b,
                  bool packed_c) {
  constexpr int kStates = 16 / static_cast<int>(sizeof(State));
  constexpr int kChannels = stream_channels(kDecayPerState);
  constexpr int kTeams = kThreads / kLanes;
  using Mine = Owned<kLanes, kChannels>;
  using Vector = Packed<State, kStates>;
  extern __shared__ uint4 slots[];
  const auto heads = static_cast<int>(o.heads);
  const int at = static_cast<int>(threadIdx.x) % kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int n = at * kStates;
  auto* const states = static_cast<State*>(o.state.data);
  const auto headdim = static_cast<int>(o.headdim);
  const auto slot = [&](int stage, int i) {
    return slots + (stage * kChannels + i) * kThreads + static_cast<int>(threadIdx.x);
  };
  // Lanes beyond the last channel repeat it, and keep what they get to themselves.
  const auto channel = [&](int tile, int i) { return (tile * kChannels + i) * kTeams + team; };
  const auto channel_or_last = [&](int tile, int i) { return min(channel(tile, i), headdim - 1); };

  // With a decay for each state the grid is a multiple of the tiles of an entry: A stays the same.
  const Place stride = Place::of(gridDim.x, heads, tiles);
  Place ahead = Place::of(blockIdx.x, heads, tiles);
  const auto count = static_cast<int>((items - blockIdx.x + gridDim.x - 1) / gridDim.x);

  int fetched = 0;
  const auto fetch = [&] {
    if (fetched < count) {
      const std::int64_t row = o.row_of(ahead.b);
      const int stage = fetched % kStages;
      if (row >= 0) {
        const State* from = states + o.state.offset(row, ahead.h, 0, n);
#pragma unroll
        for (int i = 0; i < kChannels; ++i)
          cuda::copy_async(slot(stage, i), from + channel_or_last(ahead.tile, i) * o.state.stride[2]);
      }
      ahead.advance(stride, heads, tiles);
      ++fetched;
    }
    cuda::commit_copies();
  };

  // What a tile needs beside its states, as it comes from memory.
  struct Inputs {
    std::uint32_t x[Mine::kCount];
    std::uint32_t z[Mine::kCount];
    std::uint32_t dt[kDecayPerState ? Mine::kCount : 1];
  };
  const auto load_inputs = [&](const Place& place) {
    Inputs in;
#pragma unroll
    for (int j = 0; j < Mine::kCount; ++j) {
      const int p = channel_or_last(place.tile, Mine::channel(at, j));
      in.x[j] = bits_of(o.x, place.b, 0, place.h, p);
      in.z[j] = bits_of(o.z, place.b, 0, place.h, p);
      if (kDecayPerState || j == 0) in.dt[j] = bits_of(o.dt, place.b, 0, place.h, p);
    }
    return in;
  };
  const auto load_factors = [&](const Place& place, cuda::Bits<kStates>& B, cuda::Bits<kStates>& C) {
    const std::int64_t g = place.h / o.heads_per_group;
    B = load_factor<kStates>(o.B, o.B.offset(place.b, 0, g, n), packed_b);
    C = load_factor<kStates>(o.C, o.C.offset(place.b, 0, g, n), packed_c);
  };

#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) fetch();
  Place next = Place::of(blockIdx.x, heads, tiles);
  Inputs coming = load_inputs(next);
  cuda::Bits<kStates> B_bits;
  cuda::Bits<kStates> C_bits;
  load_factors(next, B_bits, C_bits);
  float B[kStates];
  float C[kStates];
  float A[kDecayPerState ? kChannels : 1][kDecayPerState ? kStates : 1];
  if constexpr (kDecayPerState) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      cuda::Bits<kStates> bits;
      bits.load_packed(o.A.data, DType::f32, o.A.offset(next.h, channel_or_last(next.tile, i), n));
      bits.to_floats(DType::f32, A[i]);
    }
  }
  for (int item = 0; item < count; ++item) {
    const Place place = next;
    fetch();
    const Inputs in = coming;
    B_bits.to_floats(o.B.dtype, B);
    C_bits.to_floats(o.C.dtype, C);
    next.advance(stride, heads, tiles);
    if (item + 1 < count) {
      coming = load_inputs(next);
      load_factors(next, B_bits, C_bits);
    }

    float input[Mine::kCount];
    float step[kDecayPerState ? Mine::kCount : 1];
#pragma unroll
    for (int j = 0; j < Mine::kCount; ++j) {
      input[j] = cuda::float_of(in.x[j], o.x.dtype);
      if (kDecayPerState || j == 0) {
        const int p = channel_or_last(place.tile, Mine::channel(at, j));
        step[j] = o.limited(cuda::float_of(in.dt[j], o.dt.dtype) +
                            cuda::float_of(bits_of(o.dt_bias, place.h, p), o.dt_bias.dtype));
      }
    }
    float common = 0.0F;
    if constexpr (!kDecayPerState)
      common = expf(step[0] * cuda::float_of(bits_of(o.A, place.h, 0, 0), o.A.dtype));
    const std::int64_t row = o.row_of(place.b);
    State* const to = row < 0 ? nullptr : states + o.state.offset(row, place.h, 0, n);

    cuda::wait_for_copies<kStages - 1>();
    const int stage = item % kStages;
    float y[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      constexpr int kCount = Mine::kCount;
      const float step_of_i = kDecayPerState ? __shfl_sync(kAll, step[i % (kDecayPerState ? kCount : 1)],
                                                           Mine::lane_of(i), kLanes)
                                             : step[0];
      const float scaled = step_of_i * __shfl_sync(kAll, input[i % kCount], Mine::lane_of(i), kLanes);
      Vector state = *reinterpret_cast<const Vector*>(slot(stage, i));
      y[i] = 0.0F;
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        float decay = common;
        if constexpr (kDecayPerState) decay = power_of_2(step_of_i * kLog2E * A[i][j]);
        const float value = advance(decay, cuda::to_float(state.v[j]), scaled, B[j]);
        y[i] = fmaf(value, C[j], y[i]);
        state.v[j] = cuda::from_float<State>(value);
      }
      if (to != nullptr && channel(place.tile, i) < headdim)
        __stcs(reinterpret_cast<uint4*>(to + channel(place.tile, i) * o.state.stride[2]),
               *reinterpret_cast<const uint4*>(&state));
    }
    sum_over_lanes<kLanes>(y, at);
#pragma unroll
    for (int j = 0; j < Mine::kCount; ++j) {
      const int p = channel(place.tile, Mine::channel(at, j));
      if (at % Mine::kShare != 0 || p >= headdim) continue;
      float sum = y[j];
      if (o.D) sum = fmaf(o.D.load(place.h, p), input[j], sum);
      if (o.z) sum *= cuda::silu(cuda::float_of(in.z[j], o.z.dtype));
      o.out.store(row < 0 ? 0.0F : sum, place.b, 0, place.h, p);
    }
  }
}

template <typename State, int kLanes, bool kDecayPerState>
void launch_stream(Context& ctx, const Problem& p, const StreamPlan& plan) {
  constexpr int kStates = 16 / static_cast<int>(sizeof(State));
  constexpr std::size_t kShared = std::size_t{16} * kThreads * stream_channels(kDecayPerState) * kStages;
  cuda::launch(ctx, "state_update", stream_states<State, kLanes, kDecayPerState>,
               dim3(static_cast<unsigned>(plan.blocks)), dim3(kThreads), kShared, Operands(p),
               static_cast<int>(plan.tiles), plan.items, in_pieces(p.B, kStates), in_pieces(p.C, kStates));
}

}  // namespace

bool run_stream(Context& ctx, const Problem& p) {
  const StreamPlan plan = choose_stream_plan(p, cuda::limits_of(ctx).multiprocessors);
  cuda::dispatch_element(p.state.dtype(), "[state_update] state", [&](auto element) {
    using State = decltype(element);
    switch (plan.lanes) {
      case 2: return launch_stream<State, 2, true>(ctx, p, plan);
      case 4: return launch_stream<State, 4, true>(ctx, p, plan);
      case 8: return launch_stream<State, 8, false>(ctx, p, plan);
      case 16: return launch_stream<State, 16, false>(ctx, p, plan);
      case 32: return launch_stream<State, 32, false>(ctx, p, plan);
      default: return;
    }
  });
  return plan.lanes > 0;
}

}  // namespace krait::update
