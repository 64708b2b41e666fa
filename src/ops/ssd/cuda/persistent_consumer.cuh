// The warpgroups that have states in the persistent forward: outputs and states of one tile of 64 channels.
#pragma once

#include "ops/ssd/cuda/persistent.cuh"

#ifdef KRAIT_WGMMA

namespace krait::ssd_detail {

// The masked matrix of a chunk from C B^T: of strips of 8 rows a warp has one and its mirror image.
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
    for (int j0 = 0; j0 < (half + 1) * 4; j0 += 4) {
      const unsigned at = Panel::offset(strip * 8 + lane % 8, j0 + lane / 8);
      unsigned v[4];
      load_matrices<false>(v, pairs + at);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int j = j0 + k;
        if (j > strip) {
          v[k] = 0;
          continue;
        }
        const float2 a_other = *reinterpret_cast<const float2*>(&factors.a[j * 8 + column]);
        const float2 d_other = *reinterpret_cast<const float2*>(&factors.d[j * 8 + column]);
        const float2 product = unpack<T>(v[k]);
        v[k] = pack<T>(product.x * (exp2_fast(a - a_other.x) * d_other.x),
                       product.y * (exp2_fast(a - a_other.y) * d_other.y)) &
               (j == strip ? kept : 0xffffffffU);
      }
      store_matrices<false>(M + at, v);
    }
  }
}

template <typename T, int kN>
struct Consumer {
  using At = Layout<kN>;
  float S[kN / 8][4];
  unsigned operand[kN / 16][4];  // S, rounded

  __device__ __forceinline__ void round_state() {
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        operand[n][k] = pack<T>(S[2 * n + k / 2][k % 2 * 2], S[2 * n + k / 2][k % 2 * 2 + 1]);
    }
  }

  // Calls f(channel, column, value) for all elements of the state, through `tile` of 64 x 32 floats.
  template <bool kRead, typename F>
  __device__ __forceinline__ void each(float* tile, int warpgroup, std::int64_t d_state, const F& f) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    float* const own = tile + (thread / 32 * 16 + thread % 32 / 4) * 32 + thread % 4 * 2;
#pragma unroll
    for (int quarter = 0; quarter < kN / 32; ++quarter) {
      sync_warpgroup(warpgroup);
      const auto exchange = [&] {
#pragma unroll 4
        for (int i = thread; i < kChannels * 32; i += kWarpgroup) {
          const int n = quarter * 32 + i % 32;
          if (n < d_state)
            f(i / 32, n, tile[i]);
          else if (kRead)
            tile[i] = 0.0F;
        }
      };
      if (kRead) {
        exchange();
        sync_warpgroup(warpgroup);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          float2& at = *reinterpret_cast<float2*>(own + k * 4 * 32 + n * 8);
          float(&s)[4] = S[quarter * 4 + n];
          if (kRead) {
            s[k] = at.x;
            s[k + 1] = at.y;
          } else {
            at = make_float2(s[k], s[k + 1]);
          }
        }
      }
      if (!kRead) {
        sync_warpgroup(warpgroup);
        exchange();
      }
    }
    sync_warpgroup(warpgroup);
  }

  // The state before a part from what blocks [first, last) handed on.
  __device__ __forceinline__ void receive(const Exchange& exchange, int first, int last, int which,
                                          int warpgroup) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
#pragma unroll 1
    for (int block = first; block < last; ++block) {
      const int slot = block * 2 + which;
      unsigned ready = 0;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n"
                     : "=r"(ready)
                     : "l"(exchange.flags + slot)
                     : "memory");
      } while (ready == 0);
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
    __threadfence();
    sync_warpgroup(warpgroup);
    if (thread == 0)
      asm volatile("st.release.gpu.global.u32 [%0], %1;\n" ::"l"(exchange.flags + slot), "r"(1U) : "memory");
  }

  // Where outputs of a part go, 8 channels a thread of every 16th token.
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

  // Chunk k of the block; returns the sum of its exponents.
  template <bool kOutputs>
  __device__ __forceinline__ float chunk(Rows& rows, const float (&skip)[2], int k, int warpgroup,
                                         char* memory, unsigned shared, const Barriers& barriers) {
    const int which = warpgroup - 1;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int warp = __shfl_sync(0xffffffffU, thread / 32, 0);
    const int lane = thread % 32;
    const int column = lane % 4 * 2;
    const int stage = k % kStages;
    const unsigned at = shared + static_cast<unsigned>(stage * At::stage);
    const unsigned x_tile = at + static_cast<unsigned>(At::x + which * kTile);
    const unsigned M = shared + static_cast<unsigned>(At::M + which * kTile);
    const Factors& factors = reinterpret_cast<const Factors*>(memory + At::factors)[k % 2 * 2 + which];
    cuda::wait_for_phase(barriers.full(stage), k / kStages % 2);

    // While products run, nothing else may write what a later one adds to: S is scaled before all.
    const float exponent = factors.a[kTokens - 1];
    const float decay = exp2_fast(exponent);
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) S[n][i] *= decay;
    }
    float y[kTokens / 8][4];  // S C^T
    if constexpr (kOutputs) {
      cuda::fence_sums();
#pragma unroll
      for (int n = 0; n < kN; n += 16)
        cuda::multiply_add_async<T, Operand::along_depth>(
            y, operand[n / 16], cuda::describe<kTokens, Operand::along_depth>(at + At::C, 0, n), n > 0);
      cuda::commit_products();
    }

    unsigned x[kTokens / 16][4];     // its transpose, as left operand
    unsigned left[kTokens / 16][4];  // with what the end has of each token
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j) {
      load_a_transposed<kChannels>(x[j], x_tile, j * 16, warp * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 factor = *reinterpret_cast<const float2*>(&factors.left[j * 16 + i / 2 * 8 + column]);
        const float2 v = unpack<T>(x[j][i]);
        left[j][i] = pack<T>(v.x * factor.x, v.y * factor.y);
      }
    }
    cuda::fence_sums();
#pragma unroll
    for (int j = 0; j < kTokens / 16; ++j)
      cuda::multiply_add_async<T, Operand::across_depth>(
          S, left[j], cuda::describe<kTokens, Operand::across_depth>(at + At::B, j * 16, 0), 1);
    cuda::commit_products();

    if constexpr (kOutputs) {
      mask_pairs<T>(shared + At::pairs, M, factors, warp, lane);
      cuda::fence_shared();
    }
    sync_warpgroup(warpgroup);
    cuda::arrive_if(lane == 0, barriers.pairs_free());
    float inside[kTokens / 8][4];  // what y has of the chunk's own tokens
    if constexpr (kOutputs) {
      cuda::wait_for_products<1>();
      cuda::keep_registers(y);
      cuda::keep_registers(operand);
      cuda::fence_sums();
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j)
        cuda::multiply_add_async<T, Operand::along_depth>(
            inside, x[j], cuda::describe<kTokens, Operand::along_depth>(M, 0, j * 16), j > 0);
      cuda::commit_products();
    }
    cuda::wait_for_products<0>();
    cuda::keep_registers(S);
    cuda::keep_registers(left);
    if constexpr (kOutputs) {
      cuda::keep_registers(x);
      cuda::keep_registers(inside);
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
        const float2 factor = *reinterpret_cast<const float2*>(&factors.start[n * 8 + column]);
        // Again from its tile: unpacked values would take more registers than there are. Nobody has written
        // to these columns but the warp itself.
        if (n % 2 == 0) load_a_transposed<kChannels>(x[n / 2], x_tile, n * 8, warp * 2);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const float2 v = unpack<T>(x[n / 2][n % 2 * 2 + i / 2]);
          y[n][i] = fmaf(skip[i / 2], v.x, fmaf(y[n][i], factor.x, inside[n][i]));
          y[n][i + 1] = fmaf(skip[i / 2], v.y, fmaf(y[n][i + 1], factor.y, inside[n][i + 1]));
        }
      }
      round_state();
#pragma unroll
      for (int n = 0; n < kTokens / 8; n += 2) {
        const unsigned v[4] = {pack<T>(y[n][0], y[n][1]), pack<T>(y[n][2], y[n][3]),
                               pack<T>(y[n + 1][0], y[n + 1][1]), pack<T>(y[n + 1][2], y[n + 1][3])};
        store_matrices<true>(x_tile + Panel::offset((n + lane / 16) * 8 + lane % 8, warp * 2 + lane / 8 % 2),
                             v);
      }
      sync_warpgroup(warpgroup);
      rows.write(memory + stage * At::stage + At::x + which * kTile, thread);
    }
    __syncwarp();
    cuda::arrive_if(lane == 0, barriers.empty(stage));
    return exponent;
  }

  __device__ __forceinline__ void run(const Inputs& in, const Segments& chunks, Parts<FirstChunk> parts,
                                      int block, const Exchange& exchange, const AnyView<4>& out,
                                      const AnyView<4>& final_states, char* memory, unsigned shared,
                                      const Barriers& barriers) {
    const int warpgroup = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    const int which = warpgroup - 1;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    float* const staging = reinterpret_cast<float*>(memory + At::M + which * kTile);

    int k = 0;
    Part part;
    while (parts.next(part)) {
      const TileOf tile(in, part.pair, which);
      const Segment segment = segment_of(chunks, part);
      if (part.waits) {
        receive(exchange, part.first_block, block, which, warpgroup);
      } else if (segment.initial && in.initial) {
        each<true>(staging, warpgroup, in.d_state, [&](int p, int n, float& v) {
          v = in.initial.load(segment.sequence, tile.head, tile.channel0 + p, n);
        });
      } else {
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) S[n][0] = S[n][1] = S[n][2] = S[n][3] = 0.0F;
      }
      float exponents = 0.0F;
      if (part.outputs) {
        round_state();
        // What no strip of M reaches is 0 all along.
        *reinterpret_cast<uint4*>(memory + At::M + which * kTile +
                                  Panel::offset(thread / 4, 4 + thread % 4)) = make_uint4(0, 0, 0, 0);
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
        float skip[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          skip[i] =
              in.D ? in.D.load(tile.head, tile.channel0 + thread / 32 * 16 + thread % 32 / 4 + i * 8) : 0.0F;
#pragma unroll 1
        for (int i = 0; i < part.count; ++i)
          exponents += chunk<true>(rows, skip, k++, warpgroup, memory, shared, barriers);
      } else {
        Rows rows{};
#pragma unroll 1
        for (int i = 0; i < part.count; ++i)
          exponents += chunk<false>(rows, {}, k++, warpgroup, memory, shared, barriers);
      }

      if (part.publishes) hand_on(exchange, block, which, warpgroup, exp2_fast(exponents));
      if (part.outputs && segment.final && final_states)
        each<false>(staging, warpgroup, in.d_state, [&](int p, int n, float v) {
          if (tile.own) final_states.store(v, segment.sequence, tile.head, tile.channel0 + p, n);
        });
    }
  }
};

}  // namespace krait::ssd_detail

#endif  // KRAIT_WGMMA
