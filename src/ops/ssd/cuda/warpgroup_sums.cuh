// What warpgroups of warpgroup_backward.cu do beside the pairs: the products with states, dB and dC, sums
// over the heads, and the gradients that the sums of a head become.
#pragma once

#include "ops/ssd/cuda/pair_factor.cuh"
#include "ops/ssd/cuda/warpgroup_backward.cuh"

#ifdef KRAIT_WGMMA

namespace krait::ssd_detail {

// Of a head whose sums are there, and `state`, its <G, S>, by a warp: the gradient by dt, and what the chunk
// has of those by A, dt_bias and D. `of_token`: where the lane's tokens have the gradient by dt of head 0.
__device__ __forceinline__ void finish_head(const Inputs& in, const Work& work, std::int64_t head,
                                            const Values& values, float state,
                                            const std::int64_t (&of_token)[2], const Gradients& to,
                                            const Sums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Tokens `lane` and `lane` + 32.
  float from_end[2];    // to be summed over i >= t
  float from_start[2];  // over j < t
  float own[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + i * 32;
    from_end[i] = (values.sums[kRows][t] + values.sums[kRows + 1][t]) +
                  (values.sums[kRows + 2][t] + values.sums[kRows + 3][t]) - values.sums[kColumns][t];
    from_end[i] += values.sums[kStart][t];
    own[i] = from_start[i] = values.sums[kEnds][t];
  }
#pragma unroll 1
  for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float after = __shfl_down_sync(0xffffffffU, from_end[i], distance);
      if (lane + distance < 32) from_end[i] += after;
      const float before = __shfl_up_sync(0xffffffffU, from_start[i], distance);
      if (lane >= distance) from_start[i] += before;
    }
  }
  from_end[0] += __shfl_sync(0xffffffffU, from_end[1], 0);
  from_start[1] += __shfl_sync(0xffffffffU, from_start[0], 31);
  state *= exp2_fast(values.steps.a[kTokens - 1]);

  float dA = 0.0F;
  float ddt_bias = 0.0F;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = lane + i * 32;
    if (t >= work.chunk.count) continue;
    const float exponent = from_end[i] + (from_start[i] - own[i]) + state;
    dA = fmaf(values.steps.d[t], exponent, dA);
    const float of_x = __fdividef(values.sums[kColumns][t] + own[i], divisor_of(values.steps.d[t]));  // x . v
    const float dd = fmaf(values.rate, exponent, of_x) * values.steps.slope[t];
    ddt_bias += dd;
    if (to.ddt) cuda::store_float(to.ddt.data, to.ddt.dtype, of_token[i] + head * to.ddt.stride[2], dd);
  }
#pragma unroll 1
  for (int distance = 16; distance > 0; distance /= 2) {
    dA += __shfl_xor_sync(0xffffffffU, dA, distance);
    ddt_bias += __shfl_xor_sync(0xffffffffU, ddt_bias, distance);
  }
  float dD = 0.0F;
  for (int w = 0; w < kWarps; ++w) dD += values.skip[w];
  // A lane each.
  float* const of_heads = lane == 0 ? sums.dA : lane == 1 ? sums.ddt_bias : lane == 2 ? sums.dD : nullptr;
  if (of_heads != nullptr) of_heads[work.s * in.heads + head] = lane == 0 ? dA : lane == 1 ? ddt_bias : dD;
}

// Rows of sums over heads to where they belong: to the gradient itself, in T, or to the block's part of it.
template <typename T, int kN>
__device__ __forceinline__ void store_rows(const AnyView<4>& gradient, float* part, const Inputs& in,
                                           const Segments& chunks, const Work& work, std::int64_t stride,
                                           const int (&tokens)[2], const float (&d)[kN / 8][4], int lane) {
  if (!gradient && part == nullptr) return;
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const int t = tokens[k / 2];
    if (t >= work.chunk.count) continue;
    const std::int64_t position = chunks.position(work.chunk, t);
    const int column0 = lane % 4 * 2;
    if (gradient) {
      T* to = static_cast<T*>(gradient.data) + gradient.offset(work.chunk.row, position, work.group, 0);
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
        if (n * 8 + column0 < in.d_state)
          *reinterpret_cast<unsigned*>(to + n * 8 + column0) = pack<T>(d[n][k], d[n][k + 1]);
    } else {
      const std::int64_t token = work.chunk.row * chunks.length + position;
      float* to = part + work.part * stride + (token * in.groups + work.group) * in.d_state;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
        if (n * 8 + column0 < in.d_state)
          *reinterpret_cast<float2*>(to + n * 8 + column0) = make_float2(d[n][k], d[n][k + 1]);
    }
  }
}

// What the lane has of <G, S>: the diagonals of products of 16 rows of G by those of S, which add up in one
// place. Of each half there are two sums, none of which waits for the other.
template <typename T, int kN>
__device__ __forceinline__ float product_of_states(unsigned S, unsigned G, int lane) {
  float squares[2][2][4] = {};
#pragma unroll 1
  for (int row = 0; row < kChannels; row += 16) {
#pragma unroll 4
    for (int k = 0; k < kN / 16; ++k) {
      const auto panel = static_cast<unsigned>(k / 4 * Panels::kPanel);
      unsigned g[4];
      unsigned s[4];
      load_matrices<false>(g, operand_address<64>(G + panel, row, k % 4 * 2, lane % 16, lane / 16));
      load_matrices<false>(
          s, operand_address<64>(S + panel, row, k % 4 * 2, lane % 8 + lane / 16 * 8, lane / 8 % 2));
      multiply_add<T>(squares[k % 2][0], g, s[0], s[1]);
      multiply_add<T>(squares[k % 2][1], g, s[2], s[3]);
    }
  }
  float sum = 0.0F;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (lane / 4 == lane % 4 * 2 + k) sum += squares[i][0][k] + squares[i][1][2 + k];
  }
  return sum;
}

// All threads of the warpgroup: of all heads dC by dy S and dB by x G; after `meet` what the pairs add
// to them.
template <typename T, int kN, typename Meet>
__device__ __forceinline__ void states_of_chunk(const Inputs& in, const Segments& chunks, const Work& work,
                                                const Gradients& to, const Sums& sums, char* shared,
                                                unsigned base, const ChunkBarriers& barriers, int warp,
                                                int lane, const Meet& meet) {
  using At = ChunkLayout<kN>;
  using cuda::describe;
  using cuda::Operand;
  constexpr Operand kAlong = Operand::along_depth;
  constexpr Operand kAcross = Operand::across_depth;
  float dC[kN / 8][4] = {};
  float dB[kN / 8][4] = {};
  cuda::wait_for_phase(barriers.constants(), 0);
  for (Item item(work); item.exists(); item.next()) {
    barriers.wait_for_rows(item);
    barriers.wait_for_states(item);
    const bool there = item.there();
    if (there) {
      barriers.wait_for_steps(item);
      const unsigned rows = base + static_cast<unsigned>(At::rows + item.row_stage() * At::row_stage);
      const unsigned states = base + static_cast<unsigned>(At::states + item.state_stage() * At::state_stage);
      const int now = afresh(lane) & 31;  // not below 0, which divisions would care for
      const int tokens[2] = {warp * 8 + now / 4, (7 - warp) * 8 + now / 4};
      Values& values = reinterpret_cast<Values*>(shared + At::values)[item.slot()];
      const Steps& steps = values.steps;

      // dy . S C, 32 channels at a time.
      float off[2] = {};
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        float y[4][4];
        begin_product<T, kN, kAlong, kAlong>(y, base + At::C,
                                             states + static_cast<unsigned>(At::S + half * 32 * 128));
        unsigned dy[2][4];
        load_rows_of_warp(dy, rows + At::dy, warp * 16, half * 4, now);
        cuda::wait_for_products<0>();
        cuda::keep_registers(y);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            const float2 value = unpack<T>(dy[p / 2][p % 2 * 2 + k / 2]);
            off[k / 2] = fmaf(y[p][k], value.x, fmaf(y[p][k + 1], value.y, off[k / 2]));
          }
        }
      }
      // `sum` += what is at `from`, its rows scaled, times the tile at `by`; `meanwhile()` goes on beside it.
      const auto add_product = [&](float(&sum)[kN / 8][4], unsigned from, const float* factors, unsigned by,
                                   const auto& meanwhile) {
        __syncwarp();  // nothing of this comes forward to where there are no registers for it
        const float own[2] = {factors[tokens[0]], factors[tokens[1]]};
        const PairFactor<T> factor[2] = {{own[0], own[0]}, {own[1], own[1]}};
        unsigned left[4][4];
        load_rows_of_warp(left, from, warp * 16, 0, now);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
#pragma unroll
          for (int k = 0; k < 4; ++k) left[p][k] = factor[k % 2].times(left[p][k]);
        }
        cuda::keep_registers(left);
        cuda::keep_registers(sum);
        begin_product<T>(sum, left, by);
        meanwhile();
        cuda::wait_for_products<0>();
        cuda::keep_registers(left);
        cuda::keep_registers(sum);
      };
      add_product(dC, rows + At::dy, steps.start, states + At::S, [&] {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          off[k] = sum_of_row(off[k]) * steps.start[tokens[k]];
          float& at = values.sums[kStart][tokens[k]];
          if (now % 4 == 0) at = item.tile == 0 ? off[k] : at + off[k];
        }
      });
      add_product(dB, rows + At::x, steps.left, states + At::G, [] {});
    }
    __syncwarp();
    if (cuda::arrives_for_warp(lane)) {
      cuda::arrive(barriers.rows_empty(item.row_stage()));
      cuda::arrive(barriers.states_empty(item.state_stage()));
      if (there && item.ends_head()) cuda::arrive(barriers.sums(item.slot()));
    }
  }
  meet();
  cuda::keep_registers(dC);
  cuda::keep_registers(dB);
  cuda::fence_sums();
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const unsigned W = base + static_cast<unsigned>(At::dx + which * At::kOfP);
#pragma unroll
    for (int k = 0; k < kTokens; k += 16) {
      cuda::multiply_add_async<T, kAcross, kAcross>(dC, describe<kTokens, kAcross>(W, k, 0),
                                                    describe<kTokens, kAcross>(base + At::B, k, 0), 1);
      cuda::multiply_add_async<T, kAlong, kAcross>(dB, describe<kTokens, kAlong>(W, 0, k),
                                                   describe<kTokens, kAcross>(base + At::C, k, 0), 1);
    }
  }
  cuda::commit_products();
  cuda::wait_for_products<0>();
  cuda::keep_registers(dC);
  cuda::keep_registers(dB);
  const int tokens[2] = {warp * 8 + lane / 4, (7 - warp) * 8 + lane / 4};
  store_rows<T, kN>(to.dC, sums.dC, in, chunks, work, sums.stride, tokens, dC, lane);
  store_rows<T, kN>(to.dB, sums.dB, in, chunks, work, sums.stride, tokens, dB, lane);
}

}  // namespace krait::ssd_detail

#endif
