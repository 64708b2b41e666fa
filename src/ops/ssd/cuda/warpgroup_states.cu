// The states before chunks and the gradients by the states after them, on products of warpgroups. A block
// walks the chunks of one segment one way, for one head and 64 of its channels, with the state in f32 in the
// registers that its product accumulates in:
//   forward    S <- exp(a_last) S + sum over j of exp(a_last - a_j) d_j x_j B_j^T
//   backward   G <- exp(a_last) G + sum over i of exp(a_i) dy_i C_i^T,   the last chunk first
// Both ways are walked by one launch. What is written, in 16 bits, are images of tiles (channels, N): as they
// lie in shared memory when the chunks are worked on. Of the operands d x and dy are rounded to 16 bits with
// their factor.
#include <optional>
#include <type_traits>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/mbarrier.cuh"
#include "core/cuda/tensor_map.cuh"
#include "ops/ssd/cuda/backward.cuh"
#include "ops/ssd/cuda/panels.cuh"

namespace krait::ssd_detail {
namespace {

// Two warpgroups for the states of two tiles of a group of heads, which share B or C, and one of whose warps
// some copy what comes and others have the factors of tokens ready. Chunks are handed on by barriers of each
// stage, so that both are ahead by as many as there are.
constexpr int kSums = 256;
constexpr int kThreads = kSums + 128;
constexpr int kStages = 4;

// Of x, dout, B and C, where they are copied by tiles: whole rows that are walked from their first token on.
struct Maps {
  CUtensorMap x, dout, B, C;
};

struct Walk {
  Segments segments;    // whole chunks
  Segments chunks;      // the same runs cut into chunks
  const float* starts;  // (segments, H, P, N) before each segment; null: runs are not cut, and the
  const float* ends;    // walk begins with what is given, or 0. `ends`: the gradient after it.
  void* states;         // tiles of (chunks, H, P / 64)
  void* gradients;
  AnyView<4> dfinal, dinitial;  // in pairs, as Inputs::initial
};

// Of a tile and chunk: what multiplies the rows of tokens, and the state.
struct alignas(16) Factors {
  float of_token[kTokens];
  float of_state;
};

// Bytes from the begin of dynamic shared memory.
template <int kN>
struct Layout {
  static constexpr int kTile = kTokens * kN * 2;
  static constexpr int kOfP = kTokens * kChannels * 2;
  static constexpr int u = 0;             // x or dy, two
  static constexpr int v = u + 2 * kOfP;  // B or C
  static constexpr int stage = v + kTile;
  static constexpr int S = kStages * stage;  // of each tile those of two chunks, one of which is copied out
  static constexpr int factors = S + 4 * kTile;  // two of each stage
  static constexpr int barriers = (factors + 2 * kStages * static_cast<int>(sizeof(Factors)) + 7) / 8 * 8;
  static constexpr int total = barriers + 3 * kStages * 8;
};

#ifdef KRAIT_WGMMA

// Of two tokens for each lane of a warp, those before `count`: exp(a) or, forward, d exp(a_last - a), where a
// is the sum of the exponents up to a token.
__device__ __forceinline__ void compute_factors(const Inputs& in, bool backward, const float (&dt)[2],
                                                float bias, float rate, std::int64_t count, int lane,
                                                Factors& factors) {
  float d[2];
  float a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool inside = lane + i * 32 < count;
    const Step step = step_from(in, dt[i], bias, rate);
    d[i] = inside ? step.d : 0.0F;
    a[i] = inside ? (step.exponent < kLeastExponent ? kLeastExponent : step.exponent) * kLog2E : 0.0F;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float other = __shfl_up_sync(0xffffffffU, a[i], distance);
      if (lane >= distance) a[i] += other;
    }
  }
  a[1] += __shfl_sync(0xffffffffU, a[0], 31);
  const float last = __shfl_sync(0xffffffffU, a[1], 31);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    factors.of_token[lane + i * 32] = backward ? exp2_fast(a[i]) : d[i] * exp2_fast(last - a[i]);
  if (lane == 0) factors.of_state = exp2_fast(last);
}

#endif

template <typename T, int kN, bool kMaps>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_states_kernel(Inputs in, AnyView<4> dout, Walk walk, const __grid_constant__ Maps maps) {
#ifdef KRAIT_WGMMA
  using At = Layout<kN>;
  using cuda::Operand;
  extern __shared__ __align__(1024) float4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  const unsigned tiles_at = shared_address(shared_memory);
  Factors* const factors_of = reinterpret_cast<Factors*>(shared + At::factors);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffU, thread / 32 % 4, 0);  // of the warpgroup
  const int warpgroup = __shfl_sync(0xffffffffU, thread / 128, 0);
  // Of chunk i: copied, used, and its factors are there.
  const auto copied = [&](int i) {
    return tiles_at + static_cast<unsigned>(At::barriers + i % kStages * 24);
  };
  const auto used = [&](int i) { return copied(i) + 8; };
  const auto prepared = [&](int i) { return copied(i) + 16; };
  const auto parity_of = [&](int i) { return static_cast<unsigned>(i / kStages % 2); };
  constexpr int kCopying = kMaps ? 1 : 2;  // warps; the rest of four prepare
  if (thread == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      cuda::begin_barrier(copied(stage), kMaps ? 1 : kCopying * 32);
      cuda::begin_barrier(used(stage), kSums);
      cuda::begin_barrier(prepared(stage), cuda::arrivals_of(2));
    }
    cuda::fence_barriers();
  }
  __syncthreads();

  const bool backward = blockIdx.x % 2 != 0;
  const std::int64_t tiles = in.headdim / kChannels;
  const std::int64_t of_group = in.heads_per_group * tiles;
  const std::int64_t pairs = in.groups * ((of_group + 1) / 2);
  const std::int64_t s = blockIdx.x / 2 / pairs;
  const std::int64_t group = blockIdx.x / 2 % pairs / ((of_group + 1) / 2);
  const std::int64_t first_tile = blockIdx.x / 2 % ((of_group + 1) / 2) * 2;
  const Segment segment = walk.segments.at(s);
  // Where their number is odd the last pair of a group has one tile twice.
  const auto tile_of = [&](int which) {
    return group * of_group + (first_tile + which < of_group ? first_tile + which : first_tile);
  };

  const int count = static_cast<int>((segment.count + kTokens - 1) / kTokens);  // of chunks
  const auto begin_of = [&](int i) { return std::int64_t{backward ? count - 1 - i : i} * kTokens; };
  const AnyView<4>& rows = backward ? dout : in.x;
  const AnyView<4>& columns = backward ? in.C : in.B;
  const auto wait_for_room = [&](int i) {
    if (i >= kStages) cuda::wait_for_phase(used(i - kStages), parity_of(i - kStages));
  };
  if (warpgroup == 2 && warp < kCopying) {
    const auto panel_of = [&](const AnyView<4>& view, std::int64_t of, std::int64_t column) {
      return static_cast<const T*>(view.data) + view.offset(segment.row, 0, of, column);
    };
    for (int i = 0; i < count; ++i) {
      wait_for_room(i);
      const unsigned at = tiles_at + static_cast<unsigned>(i % kStages * At::stage);
      if constexpr (kMaps) {
        if (lane == 0) {
          const int l = static_cast<int>(segment.start + begin_of(i));
          const int b = static_cast<int>(segment.row);
          cuda::arrive_expecting(copied(i), At::stage);
#pragma unroll
          for (int which = 0; which < 2; ++which)
            cuda::copy_tile_async(at + static_cast<unsigned>(At::u + which * At::kOfP),
                                  backward ? maps.dout : maps.x,
                                  static_cast<int>(tile_of(which) % tiles * kChannels),
                                  static_cast<int>(tile_of(which) / tiles), l, b, copied(i));
#pragma unroll
          for (int panel = 0; panel < kN / 64; ++panel)
            cuda::copy_tile_async(at + static_cast<unsigned>(At::v + panel * Panels::kPanel),
                                  backward ? maps.C : maps.B, panel * 64, static_cast<int>(group), l, b,
                                  copied(i));
        }
        __syncwarp();
      } else {
        const int own = thread - kSums;
#pragma unroll
        for (int which = 0; which < 2; ++which)
          load_panels<kChannels, 64>(
              at + static_cast<unsigned>(At::u + which * At::kOfP),
              panel_of(rows, tile_of(which) / tiles, tile_of(which) % tiles * kChannels), rows.stride[1],
              kChannels, walk.segments, segment, begin_of(i), own);
#pragma unroll
        for (int panel = 0; panel < kN / 64; ++panel)
          load_panels<64, 64>(at + static_cast<unsigned>(At::v + panel * Panels::kPanel),
                              panel_of(columns, group, panel * 64), columns.stride[1],
                              in.d_state - panel * 64, walk.segments, segment, begin_of(i), own);
        cuda::commit_copies();
        if (i > 1) {
          cuda::wait_for_copies<2>();
          cuda::fence_shared();
          cuda::arrive(copied(i - 2));
        }
      }
    }
    if constexpr (!kMaps) {
      cuda::wait_for_copies<0>();
      cuda::fence_shared();
      for (int i = count > 2 ? count - 2 : 0; i < count; ++i) cuda::arrive(copied(i));
    }
    return;
  }
  if (warpgroup == 2) {
    // Tiles of chunks in turn: of number k / 2 that of k % 2.
    constexpr int kPreparing = 4 - kCopying;
    const std::int64_t heads[2] = {tile_of(0) / tiles, tile_of(1) / tiles};
    const float bias[2] = {bias_of(in, heads[0]), bias_of(in, heads[1])};
    const float rate[2] = {rate_of(in, heads[0]), rate_of(in, heads[1])};
    unsigned dt[2] = {};
    const auto begin_dt = [&](int k) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const std::int64_t t = begin_of(k / 2) + lane + j * 32;
        if (k / 2 < count && t < segment.count)
          dt[j] = load_bits(in.dt, in.dt.offset(segment.row, walk.segments.position(segment, t),
                                                k % 2 == 0 ? heads[0] : heads[1]));
      }
    };
    begin_dt(warp - kCopying);
    for (int k = warp - kCopying; k < 2 * count; k += kPreparing) {
      const int i = k / 2;
      const bool first = k % 2 == 0;
      const float values[2] = {value_of(dt[0], in.dt.dtype), value_of(dt[1], in.dt.dtype)};
      begin_dt(k + kPreparing);
      wait_for_room(i);
      compute_factors(in, backward, values, first ? bias[0] : bias[1], first ? rate[0] : rate[1],
                      segment.count - begin_of(i), lane, factors_of[i % kStages * 2 + k % 2]);
      __syncwarp();
      if (cuda::arrives_for_warp(lane)) cuda::arrive(prepared(i));
    }
    return;
  }

  const std::int64_t tile = tile_of(warpgroup);
  const std::int64_t head = tile / tiles;
  const std::int64_t channel0 = tile % tiles * kChannels;
  const bool written = warpgroup == 0 || tile != tile_of(0);
  float S[kN / 8][4] = {};
  // Calls f(element, pair) for the pairs of columns that the thread has of S, `element` where a tile in f32
  // with columns side by side has its channels `stride` apart.
  const auto for_pairs = [&](std::int64_t stride, const auto& f) {
    const std::int64_t first = (warp * 16 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int k = 0; k < 4; k += 2)
        if (n * 8 < in.d_state) f(first + k * 4 * stride + n * 8, *reinterpret_cast<float2*>(&S[n][k]));
    }
  };
  const float* from = backward ? walk.ends : walk.starts;
  std::int64_t stride = in.d_state;
  if (from != nullptr) {
    from += ((s * in.heads + head) * in.headdim + channel0) * in.d_state;
  } else if (backward ? segment.final && walk.dfinal : segment.initial && in.initial) {
    const AnyView<4>& given = backward ? walk.dfinal : in.initial;
    from = static_cast<const float*>(given.data) + given.offset(segment.sequence, head, channel0, 0);
    stride = given.stride[2];
  }
  if (from != nullptr)
    for_pairs(stride, [&](std::int64_t at, float2& v) { v = *reinterpret_cast<const float2*>(from + at); });
  const bool wants_end = backward && walk.ends == nullptr && segment.initial && walk.dinitial;
  // Of the warp's rows in the first panel of the tile of chunk 0.
  char* const images =
      static_cast<char*>(backward ? walk.gradients : walk.states) +
      ((walk.chunks.first(segment.run) + segment.begin / kTokens) * in.heads * tiles + tile) * At::kTile +
      warp * 2048;
  const auto S_at = [&](int i) {
    return tiles_at + static_cast<unsigned>(At::S + (i % 2 * 2 + warpgroup) * At::kTile);
  };

  // The left operand of a chunk's product, whose rows are channels, and the chunk's decay; waits for the
  // chunk.
  using Left = unsigned[kTokens / 16][4];
  float decay = 1.0F;
  const auto load_left = [&](int i, Left& left) {
    const Factors& factors = factors_of[i % kStages * 2 + warpgroup];
    const unsigned at =
        tiles_at + static_cast<unsigned>(i % kStages * At::stage + At::u + warpgroup * At::kOfP);
    cuda::wait_for_phase(prepared(i), parity_of(i));
    cuda::wait_for_phase(copied(i), parity_of(i));
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j) {
      load_a_transposed<kChannels>(left[j], at, j * 16, warp * 2);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 factor =
            *reinterpret_cast<const float2*>(&factors.of_token[j * 16 + k / 2 * 8 + lane % 4 * 2]);
        const float2 value = unpack<T>(left[j][k]);
        left[j][k] = pack<T>(value.x * factor.x, value.y * factor.y);
      }
    }
    decay = factors.of_state;
  };
  // The state before chunk i goes out, and the chunk is added to it while the next one's operand is made.
  // False where nothing comes after.
  const auto walk_chunk = [&](int i, Left& left, Left& next) {
    if (lane == 0) wait_for_sources<1>();
    __syncwarp();
    store_sums<T>(S_at(i), warp * 16, S, lane);
    cuda::fence_shared();
    __syncwarp();
    if (lane == 0 && written) {
      char* to = images + begin_of(i) / kTokens * in.heads * tiles * At::kTile;
#pragma unroll
      for (int panel = 0; panel < kN / 64; ++panel)
        copy_out_async(to + panel * Panels::kPanel,
                       S_at(i) + static_cast<unsigned>(panel * Panels::kPanel + warp * 2048), 2048);
      commit_copies_out();
    }
    __syncwarp();
    const bool more = i + 1 < count;
    if (!more && !wants_end) return false;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) S[n][k] *= decay;
    }
    cuda::keep_registers(left);
    cuda::fence_sums();
    const unsigned v_at = tiles_at + static_cast<unsigned>(i % kStages * At::stage + At::v);
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j)
      cuda::multiply_add_async<T, Operand::across_depth>(
          S, left[j], cuda::describe<kTokens, Operand::across_depth>(v_at, j * 16, 0), 1);
    cuda::commit_products();
    load_left(more ? i + 1 : i, next);
    cuda::wait_for_products<0>();
    cuda::keep_registers(S);
    cuda::keep_registers(left);
    cuda::arrive(used(i));
    return more;
  };
  Left left;
  Left other;
  if (count > 0) load_left(0, left);
  for (int i = 0; i < count; i += 2)
    if (!walk_chunk(i, left, other) || !walk_chunk(i + 1, other, left)) break;
  if (lane == 0) wait_for_copies_out();
  if (wants_end && written) {
    auto* const to =
        static_cast<float*>(walk.dinitial.data) + walk.dinitial.offset(segment.sequence, head, channel0, 0);
    // What nothing is left of is 0, not -0.
    for_pairs(walk.dinitial.stride[2], [&](std::int64_t at, const float2& v) {
      *reinterpret_cast<float2*>(to + at) = make_float2(v.x + 0.0F, v.y + 0.0F);
    });
  }
#endif
}

std::optional<Maps> describe_inputs(const Segments& segments, const BackwardProblem& b) {
  if (segments.listed != nullptr || segments.reverse) return std::nullopt;
  const auto x = cuda::describe_tiles(b.forward.x, kTokens);
  const auto dout = cuda::describe_tiles(b.dout, kTokens);
  const auto B = cuda::describe_tiles(b.forward.B, kTokens);
  const auto C = cuda::describe_tiles(b.forward.C, kTokens);
  if (!x || !dout || !B || !C) return std::nullopt;
  return Maps{*x, *dout, *B, *C};
}

}  // namespace

int warpgroup_states_shared_memory() { return Layout<128>::total; }

void warpgroup_states(Context& ctx, const Inputs& in, const Segments& segments, const Segments& chunks,
                      const BackwardProblem& b, const StateTiles& at) {
  const std::int64_t pairs = in.groups * ((in.heads_per_group * (in.headdim / kChannels) + 1) / 2);
  const std::int64_t blocks = segments.count * pairs * 2;
  if (blocks == 0) return;
  const std::optional<Maps> maps = describe_inputs(segments, b);
  const Tensor initial = as_pairs(ctx, b.forward.initial_states);
  const Tensor dfinal = as_pairs(ctx, b.dfinal_states);
  // Where runs are cut it has been written.
  const bool copied = !at.ends && !in_pairs(b.dinitial_states, DType::f32);
  const Tensor dinitial = copied ? ctx.empty(b.dinitial_states.shape()) : b.dinitial_states;
  Inputs own = in;
  own.initial = AnyView<4>(initial);
  cuda::dispatch_element(in.x.dtype, "[ssd_backward] x", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto with = [&](auto kernel, int shared) {
        cuda::launch(ctx, "ssd_backward states", kernel, static_cast<unsigned>(blocks), kThreads,
                     static_cast<std::size_t>(shared), own, AnyView<4>(b.dout),
                     Walk{.segments = segments,
                          .chunks = chunks,
                          .starts = at.starts ? at.starts.data<float>() : nullptr,
                          .ends = at.ends ? at.ends.data<float>() : nullptr,
                          .states = at.states.raw(),
                          .gradients = at.gradients.raw(),
                          .dfinal = AnyView<4>(dfinal),
                          .dinitial = AnyView<4>(dinitial)},
                     maps.value_or(Maps{}));
      };
      const auto launch = [&](auto of_state) {
        constexpr int kN = decltype(of_state)::value;
        with(maps ? warpgroup_states_kernel<T, kN, true> : warpgroup_states_kernel<T, kN, false>,
             Layout<kN>::total);
      };
      in.d_state <= 64 ? launch(std::integral_constant<int, 64>())
                       : launch(std::integral_constant<int, 128>());
    }
  });
  if (copied) ctx.copy(dinitial, b.dinitial_states);
}

}  // namespace krait::ssd_detail
