// Many states, one token each: a pass over memory. A block walks over tiles of channels, and the states of
// its next tiles are on their way to shared memory while it works on one, so that the memory never waits for
// arithmetic. A thread reads only what it has copied itself: there are no barriers. What is left to do for a
// tile is little more than its arithmetic: types and distances inside of a tile are known when this is
// compiled.
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

// What the plan says of the problem, as pointers and distances in elements. Channels lie side by side, and
// the states of a head without gaps.
struct StreamOperands {
  explicit StreamOperands(const Problem& p)
      : state(p.state),
        x(p.x),
        z(p.z),
        out(p.out),
        dt(p.dt),
        B(p.B),
        C(p.C),
        A(p.A),
        D(p.D),
        dt_bias(p.dt_bias),
        rows(p.indices),
        available(p.state.size(0)),
        heads(static_cast<int>(p.heads)),
        headdim(static_cast<int>(p.headdim)),
        heads_per_group(static_cast<int>(p.heads / p.groups)),
        low(p.dt_limit.low),
        high(p.dt_limit.high),
        softplus(p.dt_softplus) {}

  AnyView<4> state;
  AnyView<4> x;
  AnyView<4> z;
  AnyView<4> out;
  AnyView<4> dt;
  AnyView<4> B;
  AnyView<4> C;
  AnyView<3> A;
  AnyView<2> D;
  AnyView<2> dt_bias;
  IndexView rows;
  std::int64_t available;
  int heads;
  int headdim;
  int heads_per_group;
  float low;
  float high;
  bool softplus;

  __device__ __forceinline__ std::int64_t row_of(int b) const {
    const std::int64_t row = rows ? rows(b) : b;
    return row < available ? row : -1;
  }
  __device__ __forceinline__ float limited(float step) const {
    if (softplus) step = cuda::softplus(step);
    return step < low ? low : step > high ? high : step;
  }
};

template <typename T>
__device__ __forceinline__ T* at(const AnyView<4>& view, std::int64_t b, std::int64_t h) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[2];
}

// kCount elements side by side, aligned to their size: in 16-byte loads.
template <typename T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_pieces(const T* from) {
  Packed<T, kCount> packed;
  constexpr int kBytes = static_cast<int>(sizeof(packed));
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i)
      reinterpret_cast<uint4*>(&packed)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    static_assert(kBytes == 8);
    *reinterpret_cast<uint2*>(&packed) = *reinterpret_cast<const uint2*>(from);
  }
  return packed;
}

// T: of x, z, dt, B, C and out. d_state 16 has a decay for each state, larger ones one for a head.
template <typename T, typename State, int kDState>
__global__ void __launch_bounds__(kThreads, stream_blocks(sizeof(State), kDState == 16))
    stream_states(const __grid_constant__ StreamOperands o, int tiles, int items) {
  constexpr bool kDecayPerState = kDState == 16;
  constexpr int kStates = 16 / static_cast<int>(sizeof(State));
  constexpr int kLanes = kDState / kStates;
  constexpr int kChannels = stream_channels(kDecayPerState);
  constexpr int kTeams = kThreads / kLanes;
  constexpr int kTile = kTeams * kChannels;
  using Mine = Owned<kLanes, kChannels>;
  using Vector = Packed<State, kStates>;
  using Factors = Packed<T, kStates>;
  extern __shared__ uint4 slots[];
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int n = lane * kStates;
  uint4* const mine = slots + threadIdx.x;
  // With a decay for each state the grid is a multiple of the tiles of an entry: A stays the same.
  const Place stride = Place::of(gridDim.x, o.heads, tiles);
  Place ahead = Place::of(blockIdx.x, o.heads, tiles);
  const int count =
      (items - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  // Channels of the tile from the team's first on: the team has channels 0, kTeams, 2 kTeams, ...
  const auto left = [&](const Place& place) { return o.headdim - place.tile * kTile - team; };
  const auto states_of = [&](const Place& place, std::int64_t row) {
    return static_cast<State*>(o.state.data) + row * o.state.stride[0] + place.h * o.state.stride[1] +
           place.tile * (kTile * kDState) + (team * kDState + n);
  };

  int fetched = 0;
  const auto fetch = [&] {
    if (fetched < count) {
      const std::int64_t row = o.row_of(ahead.b);
      if (row >= 0) {
        const State* from = states_of(ahead, row);
        uint4* to = mine + fetched % kStages * (kChannels * kThreads);
        const int there = left(ahead);
#pragma unroll
        for (int i = 0; i < kChannels; ++i)
          if (i * kTeams < there) cuda::copy_async(to + i * kThreads, from + i * (kTeams * kDState));
      }
      ahead.advance(stride, o.heads, tiles);
      ++fetched;
    }
    cuda::commit_copies();
  };

  // What a tile needs beside its states; 0 for channels beyond the last.
  struct Inputs {
    T x[Mine::kCount];
    T z[Mine::kCount];
    T dt[kDecayPerState ? Mine::kCount : 1];
    Factors B;
    Factors C;
  };
  const auto load_inputs = [&](const Place& place) {
    Inputs in;
    const int there = left(place);
#pragma unroll
    for (int j = 0; j < Mine::kCount; ++j) {
      const int i = Mine::channel(lane, j) * kTeams;
      const int p = place.tile * kTile + team + i;
      in.x[j] = in.z[j] = T(0.0F);
      if (kDecayPerState || j == 0) in.dt[j] = T(0.0F);
      if (i < there) {
        in.x[j] = at<T>(o.x, place.b, place.h)[p];
        if (o.z) in.z[j] = at<T>(o.z, place.b, place.h)[p];
        if constexpr (kDecayPerState) in.dt[j] = at<T>(o.dt, place.b, place.h)[p];
      }
    }
    if constexpr (!kDecayPerState) in.dt[0] = *at<T>(o.dt, place.b, place.h);
    const int g = o.heads_per_group == o.heads ? 0 : place.h / o.heads_per_group;
    in.B = load_pieces<T, kStates>(at<T>(o.B, place.b, g) + n);
    in.C = load_pieces<T, kStates>(at<T>(o.C, place.b, g) + n);
    return in;
  };

#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) fetch();
  Place next = Place::of(blockIdx.x, o.heads, tiles);
  Inputs coming = load_inputs(next);
  float A[kDecayPerState ? kChannels : 1][kDecayPerState ? kStates : 1];
  if constexpr (kDecayPerState) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int p = min(next.tile * kTile + i * kTeams + team, o.headdim - 1);
      const auto of_states =
          load_pieces<float, kStates>(static_cast<const float*>(o.A.data) + o.A.offset(next.h, p, n));
#pragma unroll
      for (int j = 0; j < kStates; ++j) A[i][j] = of_states.v[j];
    }
  }
#pragma unroll 1
  for (int item = 0; item < count; ++item) {
    const Place place = next;
    fetch();
    const Inputs in = coming;
    next.advance(stride, o.heads, tiles);
    if (item + 1 < count) coming = load_inputs(next);

    const int there = left(place);
    float input[Mine::kCount];
    float step[kDecayPerState ? Mine::kCount : 1];
#pragma unroll
    for (int j = 0; j < Mine::kCount; ++j) {
      input[j] = cuda::to_float(in.x[j]);
      if (kDecayPerState || j == 0) {
        const int p = place.tile * kTile + team + Mine::channel(lane, j) * kTeams;
        step[j] = cuda::to_float(in.dt[j]);
        if (o.dt_bias) step[j] += o.dt_bias.load(place.h, kDecayPerState ? min(p, o.headdim - 1) : 0);
        step[j] = o.limited(step[j]);
      }
    }
    float common = 0.0F;
    if constexpr (!kDecayPerState) common = expf(step[0] * o.A.load(place.h, 0, 0));
    const std::int64_t row = o.row_of(place.b);
    State* const to = states_of(place, row);
    const int stored = row < 0 ? 0 : there;

    cuda::wait_for_copies<kStages - 1>();
    const uint4* from = mine + item % kStages * (kChannels * kThreads);
    float y[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      constexpr int kCount = Mine::kCount;
      const float step_of_i = kDecayPerState ? __shfl_sync(kAll, step[i % (kDecayPerState ? kCount : 1)],
                                                           Mine::lane_of(i), kLanes)
                                             : step[0];
      const float scaled = step_of_i * __shfl_sync(kAll, input[i % kCount], Mine::lane_of(i), kLanes);
      Vector state = *reinterpret_cast<const Vector*>(from + i * kThreads);
      y[i] = 0.0F;
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        float decay = common;
        if constexpr (kDecayPerState) decay = exp2_fast(step_of_i * kLog2E * A[i][j]);
        const float value = advance(decay, cuda::to_float(state.v[j]), scaled, cuda::to_float(in.B.v[j]));
        y[i] = fmaf(value, cuda::to_float(in.C.v[j]), y[i]);
        state.v[j] = cuda::from_float<State>(value);
      }
      if (i * kTeams < stored)
        __stcs(reinterpret_cast<uint4*>(to + i * (kTeams * kDState)),
               *reinterpret_cast<const uint4*>(&state));
    }
    sum_over_lanes<kLanes>(y, lane);
#pragma unroll
    for (int j = 0; j < Mine::kCount; ++j) {
      const int i = Mine::channel(lane, j) * kTeams;
      if (lane % Mine::kShare != 0 || i >= there) continue;
      const int p = place.tile * kTile + team + i;
      float sum = y[j];
      if (o.D) sum = fmaf(o.D.load(place.h, p), input[j], sum);
      if (o.z) sum *= cuda::silu(cuda::to_float(in.z[j]));
      at<T>(o.out, place.b, place.h)[p] = cuda::from_float<T>(row < 0 ? 0.0F : sum);
    }
  }
}

template <typename T, typename State, int kDState>
void launch_stream(Context& ctx, const Problem& p, const StreamPlan& plan) {
  constexpr std::size_t kShared = std::size_t{16} * kThreads * stream_channels(kDState == 16) * kStages;
  cuda::launch(ctx, "state_update", stream_states<T, State, kDState>,
               dim3(static_cast<unsigned>(plan.blocks)), dim3(kThreads), kShared, StreamOperands(p),
               static_cast<int>(plan.tiles), static_cast<int>(plan.items));
}

}  // namespace

bool run_stream(Context& ctx, const Problem& p) {
  const StreamPlan plan = choose_stream_plan(p, cuda::limits_of(ctx).multiprocessors);
  if (plan.blocks == 0) return false;
  cuda::dispatch_element(p.x.dtype(), "[state_update] x", [&](auto input) {
    cuda::dispatch_element(p.state.dtype(), "[state_update] state", [&](auto element) {
      using T = decltype(input);
      using State = decltype(element);
      if (p.d_state == 16) return launch_stream<T, State, 16>(ctx, p, plan);
      if (p.d_state == 64) return launch_stream<T, State, 64>(ctx, p, plan);
      launch_stream<T, State, 128>(ctx, p, plan);
    });
  });
  return true;
}

}  // namespace krait::update
