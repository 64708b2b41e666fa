// A warpgroup of the pairs of a chunk: of every second head x dy^T, M^T, v and dx, and the sum of W^T.
#pragma once

#include "ops/ssd/cuda/warpgroup_backward.cuh"

#ifdef KRAIT_WGMMA

namespace krait::ssd_detail {

// Sums over the eight lanes that share columns of fragments, of four values: the lane is left with that of
// v[bit 4 of the lane][bit 3].
__device__ __forceinline__ float sum_of_columns(const float (&v)[2][2], int lane) {
  const bool second = (lane & 16) != 0;
  float kept[2];
#pragma unroll
  for (int k = 0; k < 2; ++k)
    kept[k] = (second ? v[1][k] : v[0][k]) + __shfl_xor_sync(0xffffffffU, second ? v[0][k] : v[1][k], 16);
  const bool odd = (lane & 8) != 0;
  const float sum = (odd ? kept[1] : kept[0]) + __shfl_xor_sync(0xffffffffU, odd ? kept[0] : kept[1], 8);
  return sum + __shfl_xor_sync(0xffffffffU, sum, 4);
}

// `which`: of the two, 0 for the even heads. All threads of the warpgroup.
template <typename T, int kN, bool kMaps>
__device__ __forceinline__ void pairs_of_chunk(const Segments& chunks, const Work& work, const Gradients& to,
                                               const RowMaps& maps, char* shared, unsigned base,
                                               const ChunkBarriers& barriers, int which, int warp, int lane) {
  using At = ChunkLayout<kN>;
  using cuda::Operand;
  constexpr Operand kAlong = Operand::along_depth;
  const unsigned dx_at = base + static_cast<unsigned>(At::dx + which * At::kOfP);
  // Of the warp's rows of the strips `warp` and, below, 7 - `warp`, (B C^T)_ji, rounded, in pairs of columns.
  // Columns of even places belong to the strips 0 to 3, in the order of places, and of odd ones to 7 to 4:
  // behind the row below are only odd ones.
  unsigned bc_even[4];
  unsigned bc_odd[4][2];
  cuda::wait_for_phase(barriers.constants(), 0);
  {
    float c[8][4];
    begin_product<T, kN, kAlong, kAlong>(c, base + At::B, base + At::C);
    cuda::wait_for_products<0>();
    cuda::keep_registers(c);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      bc_even[m] = pack<T>(c[2 * m][0], c[2 * m][1]);
      bc_odd[m][0] = pack<T>(c[2 * m + 1][0], c[2 * m + 1][1]);
      bc_odd[m][1] = pack<T>(c[2 * m + 1][2], c[2 * m + 1][3]);
    }
  }
  // As `work` has them, which waits would have read again.
  const int first_head = work.first_head;
  const auto l = static_cast<int>(work.chunk.start);
  const auto b = static_cast<int>(work.chunk.row);
  float W[8][4] = {};  // W^T, summed over heads
  float skip_sum = 0.0F;
  for (Item item(work, which); item.exists(); item.next_of_head()) {
    barriers.wait_for_rows(item);
    const unsigned rows = base + static_cast<unsigned>(At::rows + item.row_stage() * At::row_stage);
    const unsigned states = base + static_cast<unsigned>(At::states + item.state_stage() * At::state_stage);
    if (!item.there()) {
      // An arrival before the stage is this item's would count for the one that has it.
      barriers.wait_for_states(item);
      if (cuda::arrives_for_warp(lane)) {
        cuda::arrive(barriers.rows_empty(item.row_stage()));
        cuda::arrive(barriers.states_empty(item.state_stage()));
      }
      continue;
    }
    barriers.wait_for_steps(item);
    const int now = afresh(lane) & 31;  // not below 0, which divisions would care for
    const int column = now % 4 * 2;
    const int tokens[2] = {warp * 8 + now / 4, (7 - warp) * 8 + now / 4};
    Values& values = reinterpret_cast<Values*>(shared + At::values)[item.slot()];
    const Steps& steps = values.steps;
    const auto put = [&](Sum sum, int t, float value) {
      float& at = values.sums[sum][t];
      at = item.tile == 0 ? value : at + value;
    };

    float dM[8][4];
    begin_product<T, kChannels, kAlong, kAlong>(dM, rows + At::x, rows + At::dy);
    const float a[2] = {steps.a[tokens[0]], steps.a[tokens[1]]};
    const float d[2] = {divisor_of(steps.d[tokens[0]]), divisor_of(steps.d[tokens[1]])};
    cuda::wait_for_products<0>();
    cuda::keep_registers(dM);

    unsigned M[4][4];
    // In place of a, in a strip with itself: the factors of pairs with i before j are 0.
    float a_within[2][2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      a_within[0][k] = column + k < now / 4 ? kNever : a[0];
      a_within[1][k] = column + k < now / 4 ? kNever : a[1];
    }
    float row_sum[2] = {};
    // Two neighbours of tile n in the upper or lower row; their columns begin at token `first`. `diagonal`:
    // of a strip with itself.
    const auto pair_of = [&](int n, int below, unsigned bc, int first, bool diagonal, float(&column_sum)[2]) {
      const float2 other = *reinterpret_cast<const float2*>(&steps.a[first + column]);
      const float2 c = unpack<T>(afresh(bc));  // here, as there are no registers to keep it in
      float m[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float dm = dM[n][below * 2 + k];
        const float weight =
            exp2_fast((k == 0 ? other.x : other.y) - (diagonal ? a_within[below][k] : a[below])) * d[below];
        m[k] = (k == 0 ? c.x : c.y) * weight;
        W[n][below * 2 + k] = fmaf(dm, weight, W[n][below * 2 + k]);
        row_sum[below] = fmaf(dm, m[k], row_sum[below]);
        column_sum[k] = fmaf(dm, m[k], column_sum[k]);
      }
      return pack<T>(m[0], m[1]);
    };
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float column_sums[2][2] = {};  // of the strips m and 7 - m
      M[m][0] = M[m][1] = M[m][3] = 0;
      M[m][2] = pair_of(2 * m + 1, 0, bc_odd[m][0], (7 - m) * 8, false, column_sums[1]);
      if (m >= warp) M[m][0] = pair_of(2 * m, 0, bc_even[m], m * 8, m == warp, column_sums[0]);
      if (m <= warp) M[m][3] = pair_of(2 * m + 1, 1, bc_odd[m][1], (7 - m) * 8, m == warp, column_sums[1]);
      const float sum = sum_of_columns(column_sums, now);
      const int t = ((now & 16) == 0 ? m : 7 - m) * 8 + column + now / 8 % 2;
      if ((now & 4) == 0) put(static_cast<Sum>(kRows + warp), t, sum);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (m == warp && column + k == now / 4) skip_sum += dM[2 * m][k] + dM[2 * m + 1][2 + k];
    }

    barriers.wait_for_states(item);
    float v[8][4];
    begin_product<T, kN, kAlong, kAlong>(v, base + At::B, states + At::G);
    const float last = steps.a[kTokens - 1];
    const float to_end[2] = {exp2_fast(last - a[0]) * d[0], exp2_fast(last - a[1]) * d[1]};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      row_sum[k] = sum_of_row(row_sum[k]);
      if (now % 4 == 0) put(kColumns, tokens[k], row_sum[k]);
    }
    cuda::wait_for_products<0>();
    cuda::keep_registers(v);
    __syncwarp();
    if (cuda::arrives_for_warp(lane)) cuda::arrive(barriers.states_empty(item.state_stage()));

    // d v, and dx.
    float ends[2] = {};
    unsigned of_x[4][4];
    load_rows_of_warp(of_x, rows + At::x, warp * 16, 0, now);
#pragma unroll
    for (int p = 0; p < 8; ++p) {
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const float2 x = unpack<T>(of_x[p / 2][p % 2 * 2 + k / 2]);
        v[p][k] *= to_end[k / 2];
        v[p][k + 1] *= to_end[k / 2];
        ends[k / 2] = fmaf(v[p][k], x.x, fmaf(v[p][k + 1], x.y, ends[k / 2]));
      }
    }
    cuda::keep_registers(M);
    cuda::keep_registers(v);
    begin_product<T>(v, M, rows + At::dy);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      ends[k] = sum_of_row(ends[k]);
      if (now % 4 == 0) put(kEnds, tokens[k], ends[k]);
    }
    if (item.ends_head()) {
      skip_sum = cuda::warp_sum(skip_sum);
      if (now == 0) values.skip[warp] = skip_sum;
      skip_sum = 0.0F;
    }
    const float skip = values.D;
    cuda::wait_for_products<0>();
    cuda::keep_registers(v);
    unsigned of_dy[4][4];
    load_rows_of_warp(of_dy, rows + At::dy, warp * 16, 0, now);
#pragma unroll
    for (int p = 0; p < 8; ++p) {
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const float2 dy = unpack<T>(of_dy[p / 2][p % 2 * 2 + k / 2]);
        v[p][k] = fmaf(skip, dy.x, v[p][k]);
        v[p][k + 1] = fmaf(skip, dy.y, v[p][k + 1]);
      }
    }
    if (kMaps && lane == 0) cuda::wait_for_stored_tiles();
    __syncwarp();
    if (cuda::arrives_for_warp(lane)) {
      cuda::arrive(barriers.rows_empty(item.row_stage()));
      if (item.ends_head()) cuda::arrive(barriers.sums(item.slot()));
    }
    if (to.dx) {
      // Through shared memory, rows of the warp's own.
      const int head = first_head + item.head;
      const int channel0 = item.tile * kChannels;
      store_sums<T>(dx_at, warp * 16, v, now);
      if constexpr (kMaps) {
        cuda::fence_shared();
        __syncwarp();
        if (lane == 0) {
          const unsigned from = dx_at + static_cast<unsigned>(warp * 2048);
          cuda::store_tile_async(maps.dx, channel0, head, l + warp * 8, b, from);
          cuda::store_tile_async(maps.dx, channel0, head, l + (7 - warp) * 8, b, from + 1024);
        }
      } else {
        __syncwarp();
        T* const out = static_cast<T*>(to.dx.data) + to.dx.offset(work.chunk.row, 0, head, channel0);
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const int row = i * 4 + now / 8;
          const int t = (i < 2 ? warp : 7 - warp) * 8 + row % 8;
          if (t >= work.chunk.count) continue;
          *reinterpret_cast<uint4*>(out + chunks.position(work.chunk, t) * to.dx.stride[1] + now % 8 * 8) =
              *reinterpret_cast<const uint4*>(shared + At::dx + which * At::kOfP +
                                              Panels::offset(warp * 16 + row, now % 8));
        }
        __syncwarp();
      }
    }
  }
  if (kMaps && lane == 0) wait_for_copies_out();
  __syncwarp();
  store_sums<T>(dx_at, warp * 16, W, lane);
  cuda::fence_shared();
}

}  // namespace krait::ssd_detail

#endif
