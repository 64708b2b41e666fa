// States over the chunks of segments, on tensor cores: a block walks the chunks of one segment, for one head
// and 64 of its channels, with the state in f32 in the registers that its product accumulates in.
//   forward    S <- exp(a_last) S + sum over j of exp(a_last - a_j) d_j x_j B_j^T
//   backward   G <- exp(a_last) G + sum over i of exp(a_i) dy_i C_i^T,   the last chunk first
// On the way the states before (gradients after) each chunk are written for the backward of the chunks, in 16
// bits. Of the operands d x and dy are rounded to 16 bits with their factor.
#include <algorithm>
#include <type_traits>

#include "ops/ssd/cuda/chunks.cuh"

namespace krait::ssd_detail {
namespace {

constexpr int kThreads = 128;

struct Walkers {
  Segments segments;    // whole chunks
  Segments chunks;      // the same runs cut into chunks; used where `states` is
  const float* starts;  // (segments, H, P, N): the state that the walk begins with; null: 0
  float* ends;          // what it ends with; null: not wanted
  void* states;         // (chunks, H, P, N): before each chunk of the walk; null: not wanted
  bool initial;         // backward: the gradient by the state before a sequence is wanted
};

// Bytes from the begin of dynamic shared memory.
template <int kN>
struct Layout {
  static constexpr int u = 0;                            // x or dy
  static constexpr int v = u + kTokens * kChannels * 2;  // B or C
  static constexpr int S = v + kTokens * kN * 2;
  static constexpr int steps = S + kChannels * kN * 2;
  static constexpr int total = steps + static_cast<int>(sizeof(Steps));
};

template <typename T, int kN, bool kBackward>
__global__ void __launch_bounds__(kThreads, kN > 64 ? 3 : 4)
    states_kernel(Inputs in, AnyView<4> dout, Walkers walkers) {
  using At = Layout<kN>;
  extern __shared__ __align__(1024) float4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  const unsigned tiles_at = shared_address(shared_memory);
  Steps& steps = *reinterpret_cast<Steps*>(shared + At::steps);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = lane / 4;         // of a fragment of sums, and 8 more
  const int column = lane % 4 * 2;  // and the next

  const Segments& segments = walkers.segments;
  const std::int64_t tiles = in.headdim / kChannels;
  const std::int64_t s = blockIdx.x / (in.heads * tiles);
  const std::int64_t head = blockIdx.x / tiles % in.heads;
  const std::int64_t channel0 = blockIdx.x % tiles * kChannels;
  const Segment segment = segments.at(s);
  if (walkers.states == nullptr) {
    if (!kBackward && segment.run_ends) return;
    if (kBackward && segment.run_begins && !(segment.initial && walkers.initial)) return;
  }
  const std::int64_t group = head / in.heads_per_group;
  const AnyView<4>& rows = kBackward ? dout : in.x;
  const AnyView<4>& columns = kBackward ? in.C : in.B;
  const T* u = static_cast<const T*>(rows.data) + rows.offset(segment.row, 0, head, channel0);
  const T* v = static_cast<const T*>(columns.data) + columns.offset(segment.row, 0, group, 0);
  const float bias = bias_of(in, head);
  const float rate = rate_of(in, head);

  float S[kN / 8][4] = {};
  // Of (segments, H, P, N).
  const std::int64_t state = ((s * in.heads + head) * in.headdim + channel0) * in.d_state;
  static_assert(At::steps - At::v == kChannels * kN * static_cast<int>(sizeof(float)));
  float* const state_tile = reinterpret_cast<float*>(shared + At::v);
  if (walkers.starts != nullptr)
    read_state<kN>(state_tile, in.d_state, S,
                   [&](int p, int n, float& value) { value = walkers.starts[state + p * in.d_state + n]; });

  const std::int64_t count = (segment.count + kTokens - 1) / kTokens;  // of chunks
  const auto begin_of = [&](std::int64_t i) { return (kBackward ? count - 1 - i : i) * kTokens; };
  const std::int64_t first_chunk =
      walkers.states == nullptr ? 0 : walkers.chunks.first(segment.run) + segment.begin / kTokens;
  float dt[2] = {};
  const auto load = [&](std::int64_t begin) {
    load_tile<kChannels, kThreads>(tiles_at + At::u, u, rows.stride[1], kChannels, segments, segment, begin);
    load_tile<kN, kThreads>(tiles_at + At::v, v, columns.stride[1], in.d_state, segments, segment, begin);
  };
  if (count > 0) {
    load(begin_of(0));
    if (warp == 0) load_dt(in, segments, segment, head, begin_of(0), lane, dt);
  }

  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t begin = begin_of(i);
    const bool more = i + 1 < count;
    if (warp == 0) compute_steps(in, dt, bias, rate, segment.count - begin, lane, steps);
    wait_for_copies();
    __syncthreads();
    if (more && warp == 0) load_dt(in, segments, segment, head, begin_of(i + 1), lane, dt);

    if (walkers.states != nullptr) {
      // Through shared memory, rows of the warp's own, to stores of 16 bytes.
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const unsigned at = pair_offset<kN>(warp * 16 + row + k * 4, n, column);
          *reinterpret_cast<unsigned*>(shared + At::S + at) = pack<T>(S[n][k], S[n][k + 1]);
        }
      }
      __syncwarp();
      constexpr int kVectors = kN / 8;
      const int first = warp * 16 + lane / kVectors;
      const int vector = lane % kVectors;
      T* to =
          static_cast<T*>(walkers.states) +
          (((first_chunk + begin / kTokens) * in.heads + head) * in.headdim + channel0 + first) * in.d_state +
          vector * 8;
#pragma unroll
      for (int p = 0; p < 16; p += 32 / kVectors) {
        if (vector * 8 < in.d_state)
          *reinterpret_cast<uint4*>(to) =
              *reinterpret_cast<const uint4*>(shared + At::S + tile_offset<kN>(first + p, vector));
        to += 32 / kVectors * in.d_state;
      }
      __syncwarp();
    }

    if (more || walkers.ends != nullptr) {
      const float decay = exp2_fast(steps.a[kTokens - 1]);
      const float* factors = kBackward ? steps.start : steps.left;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) S[n][k] *= decay;
      }
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        unsigned a[4];  // rows are channels
        load_a_transposed<kChannels>(a, tiles_at + At::u, j * 16, warp * 2);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 factor = *reinterpret_cast<const float2*>(&factors[j * 16 + k / 2 * 8 + column]);
          const float2 value = unpack<T>(a[k]);
          a[k] = pack<T>(value.x * factor.x, value.y * factor.y);
        }
#pragma unroll
        for (int n = 0; n < kN / 16; ++n) {
          unsigned b[4];
          load_b<kN>(b, tiles_at + At::v, j * 16, 2 * n);
          multiply_add<T>(S[2 * n], a, b[0], b[1]);
          multiply_add<T>(S[2 * n + 1], a, b[2], b[3]);
        }
      }
    }
    __syncthreads();  // the tiles and steps are free
    if (more) load(begin_of(i + 1));
  }
  if (walkers.ends != nullptr)
    write_state<kN>(state_tile, in.d_state, S,
                    [&](int p, int n, float value) { walkers.ends[state + p * in.d_state + n] = value; });
}

template <bool kBackward>
void walk_chunks(Context& ctx, std::string_view name, const Inputs& in, const Tensor& dout,
                 const Walkers& walkers) {
  const std::int64_t blocks = walkers.segments.count * in.heads * (in.headdim / kChannels);
  if (blocks == 0) return;
  cuda::dispatch_element(in.x.dtype, "[ssd] x", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto with = [&](auto kernel, int shared) {
        cuda::launch(ctx, name, kernel, static_cast<unsigned>(blocks), kThreads,
                     static_cast<std::size_t>(shared), in, AnyView<4>(dout), walkers);
      };
      if (in.d_state <= 64)
        with(states_kernel<T, 64, kBackward>, Layout<64>::total);
      else
        with(states_kernel<T, 128, kBackward>, Layout<128>::total);
    }
  });
}

}  // namespace

void chunked_ends(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& ends) {
  walk_chunks<false>(ctx, "ssd ends of segments", in, {},
                     {.segments = segments,
                      .chunks = {},
                      .starts = nullptr,
                      .ends = ends.data<float>(),
                      .states = nullptr,
                      .initial = false});
}

void chunked_gradient_ends(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& dout,
                           bool initial, const Tensor& ends) {
  walk_chunks<true>(ctx, "ssd gradient ends of segments", in, dout,
                    {.segments = segments,
                     .chunks = {},
                     .starts = nullptr,
                     .ends = ends.data<float>(),
                     .states = nullptr,
                     .initial = initial});
}

void chunk_states(Context& ctx, const Inputs& in, const Segments& segments, const Segments& chunks,
                  const Tensor& starts, const Tensor& states) {
  walk_chunks<false>(ctx, "ssd states of chunks", in, {},
                     {.segments = segments,
                      .chunks = chunks,
                      .starts = starts.data<float>(),
                      .ends = nullptr,
                      .states = states.raw(),
                      .initial = false});
}

void chunk_gradients(Context& ctx, const Inputs& in, const Segments& segments, const Segments& chunks,
                     const Tensor& dout, const Tensor& starts, const Tensor& gradients) {
  walk_chunks<true>(ctx, "ssd gradients of chunks", in, dout,
                    {.segments = segments,
                     .chunks = chunks,
                     .starts = starts.data<float>(),
                     .ends = nullptr,
                     .states = gradients.raw(),
                     .initial = false});
}

}  // namespace krait::ssd_detail
