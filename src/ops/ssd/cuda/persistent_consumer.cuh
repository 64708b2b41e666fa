// The warpgroups that have states in the persistent forward: outputs and states of one tile of 64 channels.
#pragma once

#include "ops/ssd/cuda/persistent.cuh"

#ifdef KRAIT_WGMMA

namespace krait::ssd_detail {

// The masked matrix of a chunk with the tile's factors, from C B^T: of strips of 8 rows a warp has one and
// its mirror image.
template <typename T>
__device__ __forceinline__ void mask_pairs(unsigned pairs, unsigned M, const Factors& factors, int warp,
                                           int lane) {
  const int row = lane / 4;
  const int column = lane % 4 * 2;
  // Of the lane's two elements of a tile on the diagonal, those not above it.
  const unsigned kept = (column <= row ? 0xffffU : 0U) | (column < row ? 0xffff0000U : 0U);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int strip = half == 0 ? warp : 7 - warp;
    const float a = factors.a[strip * 8 + row];
#pragma unroll
    for (int j0 = 0; j0 < 8; j0 += 4) {
      const unsigned at = Panel::offset(strip * 8 + lane % 8, j0 + lane / 8);
      unsigned v[4] = {};
      if (j0 <= half * 4) {
        load_matrices<false>(v, pairs + at);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int j = j0 + k;
          const float2 a_other = *reinterpret_cast<const float2*>(&factors.a[j * 8 + column]);
          const float2 d_other = *reinterpret_cast<const float2*>(&factors.d[j * 8 + column]);
          const float2 product = unpack<T>(v[k]);
          v[k] = pack<T>(product.x * (exp2_fast(a - a_other.x) * d_other.x),
                         product.y * (exp2_fast(a - a_other.y) * d_other.y)) &
                 (j < strip    ? 0xffffffffU
                  : j == strip ? kept
                               : 0U);
        }
      }
      store_matrices<false>(M + at, v);
    }
  }
}

template <typename T, int kN, bool kMaps>
struct Consumer {
  using At = Layout<kN>;
  float S[kN / 8][4];            // without the decay that is pending (Factors)
  unsigned operand[kN / 16][4];  // S, rounded

  __device__ __forceinline__ void round_state() {
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        operand[n][k] = pack<T>(S[2 * n + k / 2][k % 2 * 2], S[2 * n + k / 2][k % 2 * 2 + 1]);
    }
  }

  // Calls f(element, pair) for the pairs of columns that the thread has of the state, `element` in memory
  // where a state with columns side by side has its channels `stride` apart; pairs beyond d_state are left
  // out.
  template <typename F>
  __device__ __forceinline__ void for_pairs(std::int64_t stride, std::int64_t d_state, const F& f) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const std::int64_t first = (thread / 32 * 16 + thread % 32 / 4) * stride + thread % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int k = 0; k < 4; k += 2)
        if (n * 8 < d_state) f(first + k * 4 * stride + n * 8, *reinterpret_cast<float2*>(&S[n][k]));
    }
  }
  // The state before a sequence, from `given`.
  __device__ __forceinline__ void load(const AnyView<4>& given, std::int64_t sequence, const TileOf& tile,
                                       std::int64_t d_state) {
    const auto* from =
        static_cast<const float*>(given.data) + given.offset(sequence, tile.head, tile.channel0, 0);
    for_pairs(given.stride[2], d_state,
              [&](std::int64_t at, float2& v) { v = __ldcg(reinterpret_cast<const float2*>(from + at)); });
  }
  __device__ __forceinline__ void store(const AnyView<4>& wanted, std::int64_t sequence, const TileOf& tile,
                                        std::int64_t d_state) {
    auto* to = static_cast<float*>(wanted.data) + wanted.offset(sequence, tile.head, tile.channel0, 0);
    for_pairs(wanted.stride[2], d_state,
              [&](std::int64_t at, const float2& v) { *reinterpret_cast<float2*>(to + at) = v; });
  }

  static __device__ __forceinline__ void wait_for_flag(const unsigned* flag) {
    unsigned raised = 0;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(raised) : "l"(flag) : "memory");
    } while (raised == 0);
  }
  // What the warpgroup's threads have read and written so far comes before the flag.
  static __device__ __forceinline__ void raise_flag(unsigned* flag, int warpgroup) {
    __threadfence();
    sync_warpgroup(warpgroup);
    if (threadIdx.x % kWarpgroup == 0)
      asm volatile("st.release.gpu.global.u32 [%0], %1;\n" ::"l"(flag), "r"(1U) : "memory");
  }

  // The state before a part from what blocks [first, last) handed on.
  __device__ __forceinline__ void receive(const Exchange& exchange, int first, int last, int which,
                                          int warpgroup) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
#pragma unroll 1
    for (int block = first; block < last; ++block) {
      const int slot = block * 2 + which;
      wait_for_flag(exchange.there + slot);
      sync_warpgroup(warpgroup);
      const float decay = block == first ? 0.0F : __ldcg(exchange.decays + slot);
      const float4* from = exchange.states + slot * (kN / 8) * kWarpgroup + thread;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
        const float4 v = __ldcg(from + n * kWarpgroup);
        S[n][0] = block == first ? v.x : fmaf(decay, S[n][0], v.x);
        S[n][1] = block == first ? v.y : fmaf(decay, S[n][1], v.y);
        S[n][2] = block == first ? v.z : fmaf(decay, S[n][2], v.z);
        S[n][3] = block == first ? v.w : fmaf(decay, S[n][3], v.w);
      }
    }
  }
  __device__ __forceinline__ void hand_on(const Exchange& exchange, int block, int which, int warpgroup,
                                          float decay) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int slot = block * 2 + which;
    float4* to = exchange.states + slot * (kN / 8) * kWarpgroup + thread;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
      __stcg(to + n * kWarpgroup, make_float4(S[n][0], S[n][1], S[n][2], S[n][3]));
    if (thread == 0) __stcg(exchange.decays + slot, decay);
    raise_flag(exchange.there + slot, warpgroup);
  }

  // Where outputs of a part go that are not copied by tiles: 8 channels a thread of every 16th token.
  struct Rows {
    T* at;                          // of the thread's first token of the chunk
    std::int64_t stride;            // of 16 tokens; of a position where `positions`
    const std::int64_t* positions;  // of the thread's first token of the chunk and those after; or null
    int rest;                       // tokens from that one on; none where the tile is not the warpgroup's own

    __device__ __forceinline__ void write(const char* tile, int thread) {
      tile += Panel::offset(thread / 8, thread % 8);
      const auto to = [&](T* row, int i) {
        if (i * 16 < rest) *reinterpret_cast<uint4*>(row) = *reinterpret_cast<const uint4*>(tile + i * 2048);
      };
      if (positions == nullptr) {
#pragma unroll
        for (int i = 0; i < kTokens / 16; ++i) {
          to(at, i);
          at += stride;
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < kTokens / 16; ++i)
          if (i * 16 < rest) to(at + positions[i * 16] * stride, i);
        positions += kTokens;
      }
      rest -= kTokens;
    }
  };

  static __device__ __forceinline__ Rows rows_of(const Segments& chunks, const Segment& segment,
                                                 const TileOf& tile, const AnyView<4>& out, int thread) {
    const int first = thread / 8;
    Rows rows{.at = static_cast<T*>(out.data) + out.offset(segment.row, 0, tile.head, tile.channel0) +
                    thread % 8 * 8,
              .stride = out.stride[1],
              .positions = nullptr,
              .rest = tile.own ? static_cast<int>(segment.count) - first : 0};
    if (segment.listed >= 0) {
      rows.positions = chunks.positions + segment.listed + first;
    } else {
      rows.at += (segment.start + first * segment.step) * out.stride[1];
      rows.stride *= segment.step * 16;
    }
    return rows;
  }

  // Where a chunk's tiles lie, and what it has of each token.
  struct Place {
    unsigned shared;  // the begin of shared memory,
    unsigned stage;   // bytes from there to the stage,
    unsigned pairs;   // and to C B^T
    unsigned x;       // an address
    char* x_tile;
    const Factors& factors;
    int warpgroup, warp, lane;
    unsigned written, stored;  // barriers
    unsigned zero;             // which the compiler does not know
  };

  // What a chunk begins with.
  struct Operands {
    unsigned x[kTokens / 16][4];  // x^T as left operand, where the factors separate with the factors `left`
    Factors::Whole whole;
    int way;  // the same in all threads, and known to be
  };

  // Outputs, which are in the tile of x, to memory.
  static __device__ __forceinline__ void write_outputs(const Place& at, Rows& rows) {
    cuda::fence_shared();  // what has been written is read by copies, or written by the next ones
    if constexpr (kMaps) {
      cuda::arrive_of_warp(at.written, at.lane);
    } else {
      sync_warpgroup(at.warpgroup);
      rows.write(at.x_tile, at.warp * 32 + at.lane);
      cuda::arrive_of_warp(at.stored, at.lane);
    }
  }

  __device__ __forceinline__ void scale_state(float factor) {
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) S[n][i] *= factor;
    }
  }
  // y = S C^T, begun.
  __device__ __forceinline__ void begin_outputs(float (&y)[kTokens / 8][4], const Place& at) {
    const TileOperand<Operand::along_depth> tile(at.shared + At::C, at.stage);
#pragma unroll
    for (int n = 0; n < kN; n += 16)
      cuda::multiply_add_async<T, Operand::along_depth>(y, operand[n / 16], tile.at(0, n), n > 0);
  }
  // y += x^T M^T, M so many bytes from the begin of shared memory, and S += x^T B, begun.
  __device__ __forceinline__ void add_inside(float (&y)[kTokens / 8][4], const unsigned (&x)[kTokens / 16][4],
                                             unsigned shared, unsigned M) {
    const TileOperand<Operand::along_depth> tile(shared, M);
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j)
      cuda::multiply_add_async<T, Operand::along_depth>(y, x[j], tile.at(0, j * 16), 1);
  }
  __device__ __forceinline__ void add_to_state(const unsigned (&x)[kTokens / 16][4], const Place& at) {
    const TileOperand<Operand::across_depth> tile(at.shared + At::B, at.stage);
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j)
      cuda::multiply_add_async<T, Operand::across_depth>(S, x[j], tile.at(j * 16, 0), 1);
  }
  // x^T as left operand with a factor of each token.
  static __device__ __forceinline__ void weigh(unsigned (&to)[kTokens / 16][4],
                                               const unsigned (&x)[kTokens / 16][4], const float* factors,
                                               int lane) {
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const factor = &factors[j * 16 + i / 2 * 8 + lane % 4 * 2];
        to[j][i] = reinterpret_cast<const PairFactor<T>*>(factor)->times(x[j][i]);
      }
    }
  }
  // Outputs of the warp's channels, to the tile of x.
  static __device__ __forceinline__ void store_outputs(const float (&y)[kTokens / 8][4], const Place& at) {
#pragma unroll
    for (int n = 0; n < kTokens / 8; n += 2) {
      const unsigned v[4] = {pack<T>(y[n][0], y[n][1]), pack<T>(y[n][2], y[n][3]),
                             pack<T>(y[n + 1][0], y[n + 1][1]), pack<T>(y[n + 1][2], y[n + 1][3])};
      store_matrices<true>(
          at.x + Panel::offset((n + at.lane / 16) * 8 + at.lane % 8, at.warp * 2 + at.lane / 8 % 2), v);
    }
  }

  // A chunk whose factors are products, exp(a_i) exp(-a_j): C B^T serves as it is, both products take d x
  // exp(-a), and exp(a) multiplies their sums. `fetch` brings the next chunk's operands.
  template <bool kOutputs, typename Fetch>
  __device__ __forceinline__ void separate_chunk(const Place& at, Rows& rows, const float (&skip)[2],
                                                 Operands& own, const Fetch& fetch) {
    float y[kTokens / 8][4];
    cuda::fence_sums();
    if constexpr (kOutputs) {
      begin_outputs(y, at);
      add_inside(y, own.x, at.shared, at.pairs);
      cuda::commit_products();
    }
    add_to_state(own.x, at);
    cuda::commit_products();
    Operands next;
    fetch(next);
    if constexpr (kOutputs) {
      cuda::wait_for_products<1>();
      cuda::keep_registers(y);
      cuda::keep_registers(operand);
#pragma unroll
      for (int n = 0; n < kTokens / 8; n += 2) {
        // Again from its tile, where nobody has written to these columns but the warp itself.
        unsigned again[4];
        load_a_transposed<kChannels>(again, at.x, n * 8, at.warp * 2);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const float2 start =
              *reinterpret_cast<const float2*>(&at.factors.start[(n + m) * 8 + at.lane % 4 * 2]);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 v = unpack<T>(again[m * 2 + i]);
            y[n + m][2 * i] = fmaf(y[n + m][2 * i], start.x, skip[i] * v.x);
            y[n + m][2 * i + 1] = fmaf(y[n + m][2 * i + 1], start.y, skip[i] * v.y);
          }
        }
      }
      store_outputs(y, at);
      write_outputs(at, rows);
    }
    cuda::wait_for_products<0>();
    cuda::keep_registers(S);
    cuda::keep_registers(own.x);
    if (own.way == 2) scale_state(own.whole.scale);
      // Products read x from its registers as they run. What the compiler takes to be read last where they
      // begin it may overwrite with the next x: it has to be read here.
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) next.x[j][i] |= own.x[j][i] & at.zero;
    }
    own = next;
  }

  // Any chunk: the factors exp(a_i - a_j) multiply C B^T by elements.
  template <bool kOutputs, typename Fetch>
  __device__ __forceinline__ void masked_chunk(const Place& at, Rows& rows, const float (&skip)[2],
                                               Operands& own, const Fetch& fetch) {
    // While products run, nothing else may write what a later one adds to: S is scaled before all.
    scale_state(own.whole.scale);
    float y[kTokens / 8][4];
    if constexpr (kOutputs) {
      cuda::fence_sums();
      begin_outputs(y, at);
      cuda::commit_products();
    }
    auto& x = own.x;
    unsigned left[kTokens / 16][4];
    weigh(left, x, at.factors.left, at.lane);
    cuda::fence_sums();
    add_to_state(left, at);
    cuda::commit_products();
    if constexpr (kOutputs) {
      // Not later: M takes registers, too.
      cuda::wait_for_products<1>();
      cuda::keep_registers(y);
      cuda::keep_registers(operand);
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        const float2 start = *reinterpret_cast<const float2*>(&at.factors.start[n * 8 + at.lane % 4 * 2]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 v = unpack<T>(x[n / 2][n % 2 * 2 + i]);
          y[n][2 * i] = fmaf(y[n][2 * i], start.x, skip[i] * v.x);
          y[n][2 * i + 1] = fmaf(y[n][2 * i + 1], start.y, skip[i] * v.y);
        }
      }
      sync_warpgroup(at.warpgroup);  // x is in registers, and M takes its tile
      mask_pairs<T>(at.shared + at.pairs, at.x, at.factors, at.warp,
                    static_cast<int>(afresh(threadIdx.x) % 32));
      cuda::fence_shared();
      sync_warpgroup(at.warpgroup);
      cuda::fence_sums();
      add_inside(y, x, at.shared, at.x - at.shared);
      cuda::commit_products();
    }
    cuda::wait_for_products<0>();
    cuda::keep_registers(S);
    cuda::keep_registers(left);
    if constexpr (kOutputs) {
      cuda::keep_registers(y);
      cuda::keep_registers(x);
      sync_warpgroup(at.warpgroup);  // all have read M
      store_outputs(y, at);
      write_outputs(at, rows);
    }
    fetch(own);
  }

  static __device__ __forceinline__ unsigned x_of(unsigned shared, int stage, int which) {
    return shared + static_cast<unsigned>(stage * At::stage + At::x + which * kTile);
  }
  // What chunk k begins with, once it is there.
  static __device__ __forceinline__ void fetch(Operands& to, unsigned k, int which, const char* memory,
                                               unsigned shared, const Barriers& barriers) {
    const unsigned thread = afresh(threadIdx.x) % kWarpgroup;
    const int stage = __shfl_sync(0xffffffffU, stage_of(k), 0);
    const Factors& factors = reinterpret_cast<const Factors*>(memory + At::factors)[stage * 2 + which];
    cuda::wait_for_phase(barriers.factored(stage), phase_of(k));
    cuda::wait_for_phase(barriers.loaded(stage), phase_of(k));
    to.whole = factors.whole;
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j)
      load_a_transposed<kChannels>(to.x[j], x_of(shared, stage, which), j * 16,
                                   static_cast<int>(thread / 32) * 2);
    to.way = __shfl_sync(0xffffffffU, to.whole.way, 0);
    if (!std::is_same_v<T, __half> && to.way != 0)
      weigh(to.x, to.x, factors.left, static_cast<int>(thread % 32));
  }

  // Chunk k of the block with what it begins with, then the same of the next chunk if there is one.
  template <bool kOutputs>
  __device__ __forceinline__ void chunk(Operands& own, bool more, Rows& rows, const float (&skip)[2],
                                        unsigned k, int warpgroup, char* memory, unsigned shared,
                                        const Barriers& barriers) {
    const int which = warpgroup - 2;
    const unsigned thread = afresh(threadIdx.x) % kWarpgroup;
    const int stage = __shfl_sync(0xffffffffU, stage_of(k), 0);
    const Place place{.shared = shared,
                      .stage = static_cast<unsigned>(stage * At::stage),
                      .pairs = static_cast<unsigned>(At::pairs + stage % 2 * kTile),
                      .x = x_of(shared, stage, which),
                      .x_tile = memory + stage * At::stage + At::x + which * kTile,
                      .factors = reinterpret_cast<const Factors*>(memory + At::factors)[stage * 2 + which],
                      .warpgroup = warpgroup,
                      .warp = __shfl_sync(0xffffffffU, static_cast<int>(thread / 32), 0),
                      .lane = static_cast<int>(thread % 32),
                      .written = barriers.written(stage),
                      .stored = barriers.stored(stage),
                      .zero = k >> 31};
    cuda::wait_for_phase(barriers.paired(stage), phase_of(k));
    const auto next = [&](Operands& to) {
      if (more) fetch(to, k + 1, which, memory, shared, barriers);
    };
    if (!std::is_same_v<T, __half> && own.way != 0)
      separate_chunk<kOutputs>(place, rows, skip, own, next);
    else
      masked_chunk<kOutputs>(place, rows, skip, own, next);
    cuda::arrive_of_warp(barriers.empty(stage), place.lane);
    if constexpr (kOutputs)
      round_state();
    else
      cuda::arrive_of_warp(kMaps ? place.written : place.stored, place.lane);
  }

  __device__ __forceinline__ void run(const Inputs& in, const Segments& chunks, Parts<FirstChunk> parts,
                                      int block, const Exchange& exchange, const AnyView<4>& out,
                                      const AnyView<4>& final_states, char* memory, unsigned shared,
                                      const Barriers& barriers) {
    const int warpgroup = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    const int which = warpgroup - 2;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;

    unsigned k = 0;
    Part part;
    while (parts.next(part)) {
      const TileOf tile(in, part.pair, which);
      const Segment segment = segment_of(chunks, part);
      if (part.waits) {
        receive(exchange, part.first_block, block, which, warpgroup);
      } else {
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) S[n][0] = S[n][1] = S[n][2] = S[n][3] = 0.0F;
        if (segment.initial && in.initial) load(in.initial, segment.sequence, tile, in.d_state);
        if (exchange.begun != nullptr && part.outputs && !segment.final)
          raise_flag(exchange.begun + block * 2 + which, warpgroup);
      }
      float exponents = 0.0F;
      float rest = 1.0F;
      Operands operands;
      fetch(operands, k, which, memory, shared, barriers);
      if (part.outputs) {
        round_state();
        Rows rows{};
        if constexpr (!kMaps) rows = rows_of(chunks, segment, tile, out, thread);
        float skip[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          skip[i] =
              in.D ? in.D.load(tile.head, tile.channel0 + thread / 32 * 16 + thread % 32 / 4 + i * 8) : 0.0F;
#pragma unroll 1
        for (int i = 0; i < part.count; ++i) {
          exponents += operands.whole.last;
          rest = operands.whole.rest;
          chunk<true>(operands, i + 1 < part.count, rows, skip, k++, warpgroup, memory, shared, barriers);
        }
      } else {
        Rows rows{};
#pragma unroll 1
        for (int i = 0; i < part.count; ++i) {
          exponents += operands.whole.last;
          rest = operands.whole.rest;
          chunk<false>(operands, i + 1 < part.count, rows, {}, k++, warpgroup, memory, shared, barriers);
        }
      }

      scale_state(rest);
      if (part.publishes) hand_on(exchange, block, which, warpgroup, exp2_fast(exponents));
      if (part.outputs && segment.final && final_states && tile.own) {
        if (exchange.begun != nullptr && part.waits)
          wait_for_flag(exchange.begun + part.first_block * 2 + which);
        store(final_states, segment.sequence, tile, in.d_state);
      }
    }
  }
};

}  // namespace krait::ssd_detail

#endif  // KRAIT_WGMMA
