// The states before chunks and the gradients by the states after them, on products of warpgroups. A block
// walks the chunks of one segment one way, for one head and 64 of its channels, with the state in f32 in the
// registers that its product accumulates in:
//   forward    S <- exp(a_last) S + sum over j of exp(a_last - a_j) d_j x_j B_j^T
//   backward   G <- exp(a_last) G + sum over i of exp(a_i) dy_i C_i^T,   the last chunk first
// Both ways are walked by one launch. What is written, in 16 bits, are images of tiles (channels, N): as they
// lie in shared memory when the chunks are worked on. Of the operands d x and dy are rounded to 16 bits with
// their factor.
#include <type_traits>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/meeting.cuh"
#include "ops/ssd/cuda/backward.cuh"
#include "ops/ssd/cuda/panels.cuh"

namespace krait::ssd_detail {
namespace {

// A warpgroup for the state, and one that copies what comes and has the steps ready.
constexpr int kThreads = 256;
constexpr int kStages = 3;

struct Walk {
  Segments segments;    // whole chunks
  Segments chunks;      // the same runs cut into chunks
  const float* starts;  // (segments, H, P, N) before each segment; null: runs are not cut, and the
  const float* ends;    // walk begins with what is given, or 0. `ends`: the gradient after it.
  void* states;         // tiles of (chunks, H, P / 64)
  void* gradients;
  AnyView<4> dfinal, dinitial;
};

// Bytes from the begin of dynamic shared memory.
template <int kN>
struct Layout {
  static constexpr int kTile = kTokens * kN * 2;
  static constexpr int u = 0;                            // x or dy
  static constexpr int v = u + kTokens * kChannels * 2;  // B or C
  static constexpr int stage = v + kTile;
  static constexpr int S = kStages * stage;
  static constexpr int steps = S + kTile;
  static constexpr int total = steps + 2 * static_cast<int>(sizeof(Steps));
};

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 2)
    warpgroup_states_kernel(Inputs in, AnyView<4> dout, Walk walk) {
#ifdef KRAIT_WGMMA
  using At = Layout<kN>;
  using cuda::Operand;
  extern __shared__ __align__(1024) float4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  const unsigned tiles_at = shared_address(shared_memory);
  Steps* const steps_of = reinterpret_cast<Steps*>(shared + At::steps);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffU, thread / 32 % 4, 0);  // of the warpgroup
  const bool sums = __shfl_sync(0xffffffffU, thread / 128, 0) == 0;

  const bool backward = blockIdx.x % 2 != 0;
  const std::int64_t tiles = in.headdim / kChannels;
  const std::int64_t index = blockIdx.x / 2;
  const std::int64_t s = index / (in.heads * tiles);
  const std::int64_t head = index / tiles % in.heads;
  const std::int64_t channel0 = index % tiles * kChannels;
  const Segment segment = walk.segments.at(s);
  const std::int64_t group = head / in.heads_per_group;

  const std::int64_t count = (segment.count + kTokens - 1) / kTokens;  // of chunks
  const auto begin_of = [&](std::int64_t i) { return (backward ? count - 1 - i : i) * kTokens; };
  const AnyView<4>& rows = backward ? dout : in.x;
  const AnyView<4>& columns = backward ? in.C : in.B;
  const T* u = static_cast<const T*>(rows.data) + rows.offset(segment.row, 0, head, channel0);
  const T* v = static_cast<const T*>(columns.data) + columns.offset(segment.row, 0, group, 0);
  const auto load = [&](std::int64_t i) {  // by the second warpgroup
    if (i < count) {
      const unsigned at = tiles_at + static_cast<unsigned>(i % kStages * At::stage);
      load_panels<kChannels, 128>(at + At::u, u, rows.stride[1], kChannels, walk.segments, segment,
                                  begin_of(i), thread - 128);
      load_panels<kN, 128>(at + At::v, v, columns.stride[1], in.d_state, walk.segments, segment, begin_of(i),
                           thread - 128);
    }
    cuda::commit_copies();
  };
  const float bias = bias_of(in, head);
  const float rate = rate_of(in, head);
  float dt[2] = {};
  if (!sums) {
    load(0);
    load(1);
    if (warp == 0 && count > 0) {
      load_dt(in, walk.segments, segment, head, begin_of(0), lane, dt);
      compute_steps(in, dt, bias, rate, segment.count - begin_of(0), lane, steps_of[0]);
      if (count > 1) load_dt(in, walk.segments, segment, head, begin_of(1), lane, dt);
    }
  }

  float S[kN / 8][4] = {};
  // f(channel, column, element of S) for what the thread has.
  const auto for_elements = [&](const auto& f) {
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = n * 8 + lane % 4 * 2 + k % 2;
        if (column < in.d_state) f(channel0 + warp * 16 + lane / 4 + k / 2 * 8, column, S[n][k]);
      }
    }
  };
  if (sums) {
    const float* from = backward ? walk.ends : walk.starts;
    if (from != nullptr) {
      from += (s * in.heads + head) * in.headdim * in.d_state;
      for_elements([&](std::int64_t p, int n, float& value) { value = from[p * in.d_state + n]; });
    } else if (backward ? segment.final && walk.dfinal : segment.initial && in.initial) {
      const AnyView<4>& given = backward ? walk.dfinal : in.initial;
      for_elements(
          [&](std::int64_t p, int n, float& value) { value = given.load(segment.sequence, head, p, n); });
    }
  }
  const bool wants_end = backward && walk.ends == nullptr && segment.initial && walk.dinitial;
  // Of the warp's rows in the first panel of the tile of chunk 0.
  char* const images =
      static_cast<char*>(backward ? walk.gradients : walk.states) +
      (((walk.chunks.first(segment.run) + segment.begin / kTokens) * in.heads + head) * tiles +
       index % tiles) *
          At::kTile +
      warp * 2048;

  for (std::int64_t i = 0; i < count; ++i) {
    if (!sums) {
      cuda::wait_for_copies<1>();
      cuda::fence_shared();
    }
    cuda::meet<kThreads>();  // chunk i and its steps are there; what belongs to the one before is free
    if (!sums) {
      load(i + 2);
      if (warp == 0 && i + 1 < count) {
        compute_steps(in, dt, bias, rate, segment.count - begin_of(i + 1), lane, steps_of[(i + 1) % 2]);
        if (i + 2 < count) load_dt(in, walk.segments, segment, head, begin_of(i + 2), lane, dt);
      }
    } else {
      const Steps& steps = steps_of[i % 2];
      const unsigned at = tiles_at + static_cast<unsigned>(i % kStages * At::stage);
      if (lane == 0) wait_for_sources();
      __syncwarp();
      store_sums<T>(tiles_at + At::S, warp * 16, S);
      cuda::fence_shared();
      __syncwarp();
      if (lane == 0) {
        char* to = images + begin_of(i) / kTokens * in.heads * tiles * At::kTile;
#pragma unroll
        for (int panel = 0; panel < kN / 64; ++panel)
          copy_out_async(to + panel * Panels::kPanel,
                         tiles_at + static_cast<unsigned>(At::S + panel * Panels::kPanel + warp * 2048),
                         2048);
        commit_copies_out();
      }
      if (i + 1 < count || wants_end) {
        const float* factors = backward ? steps.start : steps.left;
        unsigned a[kTokens / 16][4];  // rows are channels
#pragma unroll
        for (int j = 0; j < kTokens / 16; ++j) {
          load_a_transposed<kChannels>(a[j], at + At::u, j * 16, warp * 2);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float2 factor =
                *reinterpret_cast<const float2*>(&factors[j * 16 + k / 2 * 8 + lane % 4 * 2]);
            const float2 value = unpack<T>(a[j][k]);
            a[j][k] = pack<T>(value.x * factor.x, value.y * factor.y);
          }
        }
        const float decay = exp2_fast(steps.a[kTokens - 1]);
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
          for (int k = 0; k < 4; ++k) S[n][k] *= decay;
        }
        cuda::keep_registers(a);
        cuda::fence_sums();
#pragma unroll
        for (int j = 0; j < kTokens / 16; ++j)
          cuda::multiply_add_async<T, Operand::across_depth>(
              S, a[j], cuda::describe<kTokens, Operand::across_depth>(at + At::v, j * 16, 0), 1);
        cuda::commit_products();
        cuda::wait_for_products<0>();
        cuda::keep_registers(S);
      }
    }
  }
  if (!sums) return;
  if (lane == 0) wait_for_copies_out();
  if (backward && segment.initial && walk.dinitial && walk.ends == nullptr) {
    // What nothing is left of is 0, not -0.
    for_elements([&](std::int64_t p, int n, float& value) {
      walk.dinitial.store(value + 0.0F, segment.sequence, head, p, n);
    });
  }
#endif
}

}  // namespace

void warpgroup_states(Context& ctx, const Inputs& in, const Segments& segments, const Segments& chunks,
                      const BackwardProblem& b, const StateTiles& at) {
  const std::int64_t blocks = segments.count * in.heads * (in.headdim / kChannels) * 2;
  if (blocks == 0) return;
  cuda::dispatch_element(in.x.dtype, "[ssd_backward] x", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto with = [&](auto kernel, int shared) {
        cuda::launch(ctx, "ssd_backward states", kernel, static_cast<unsigned>(blocks), kThreads,
                     static_cast<std::size_t>(shared), in, AnyView<4>(b.dout),
                     Walk{.segments = segments,
                          .chunks = chunks,
                          .starts = at.starts ? at.starts.data<float>() : nullptr,
                          .ends = at.ends ? at.ends.data<float>() : nullptr,
                          .states = at.states.raw(),
                          .gradients = at.gradients.raw(),
                          .dfinal = AnyView<4>(b.dfinal_states),
                          .dinitial = AnyView<4>(b.dinitial_states)});
      };
      if (in.d_state <= 64)
        with(warpgroup_states_kernel<T, 64>, Layout<64>::total);
      else
        with(warpgroup_states_kernel<T, 128>, Layout<128>::total);
    }
  });
}

}  // namespace krait::ssd_detail
