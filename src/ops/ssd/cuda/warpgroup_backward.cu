// The backward of chunks on products of warpgroups. The maths is that of chunked_backward.cu; here the pairs
// are transposed, rows j of x against columns i of dy, so that M^T goes from registers into the product with
// dy. A block takes one chunk and, in turn, some heads of a group, 64 channels at a time, which are copied
// two ahead. Three warpgroups share them, each with the sums that its products accumulate in:
//   pairs    dM^T = x dy^T, M^T, v and dx; the sum of W^T over the heads
//   C        dC, by dy S
//   B        dB, by x G; and <G, S>
// Factors of tokens multiply the products' sums. Rounded to 16 bits as operands are S, G, M and the sum of W,
// and C B^T.
#include <algorithm>
#include <type_traits>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/meeting.cuh"
#include "ops/ssd/cuda/backward.cuh"
#include "ops/ssd/cuda/panels.cuh"
#include "ops/ssd/cuda/warpgroup_sums.cuh"

namespace krait::ssd_detail {
namespace {

constexpr int kThreads = 3 * kGroup;
constexpr int kStages = 3;
enum class Role { pairs, C, B };

// Bytes from the begin of dynamic shared memory.
template <int kN>
struct Layout {
  static constexpr int kOfN = kTokens * kN * 2;
  static constexpr int kOfP = kTokens * kChannels * 2;
  static constexpr int B = 0;
  static constexpr int C = B + kOfN;
  static constexpr int dx = C + kOfN;  // at the end the sum of W^T
  static constexpr int stages = dx + kOfP;
  // Of a stage, from its begin.
  static constexpr int x = 0;
  static constexpr int dy = x + kOfP;
  static constexpr int S = dy + kOfP;  // (channels, N)
  static constexpr int G = S + kOfN;
  static constexpr int stage = G + kOfN;
  // Three: one is worked on, the one before is finished while the next one's steps are computed.
  static constexpr int values = stages + kStages * stage;
  static constexpr int total = values + 3 * static_cast<int>(sizeof(Values));
};

#ifdef KRAIT_WGMMA
// Of a thread, together three times what the launch has.
constexpr int kPairsRegisters = 184;
constexpr int kOthersRegisters = 160;
#endif

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    warpgroup_backward_kernel(Inputs in, Segments chunks, AnyView<4> dout, const void* states,
                              const void* gradients, Gradients to, Sums sums) {
#ifdef KRAIT_WGMMA
  using At = Layout<kN>;
  using cuda::describe;
  using cuda::Operand;
  constexpr Operand kAlong = Operand::along_depth;
  constexpr Operand kAcross = Operand::across_depth;
  extern __shared__ __align__(1024) float4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  const unsigned tile = shared_address(shared_memory);
  Values* const values_of = reinterpret_cast<Values*>(shared + At::values);
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  const int lane = thread % 32;
  const Role role = static_cast<Role>(__shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kGroup, 0));
  const int warp = __shfl_sync(0xffffffffU, thread / 32, 0);  // of the warpgroup
  // Of a lane: a row of its sums, 8 above another, and a column of a fragment, before another; and two
  // neighbours of these rows of a tile.
  struct Place {
    int lane, row, column;
    unsigned offset;
    __device__ Place(int at, int warp)
        : lane(at),
          row(warp * 16 + at / 4),
          column(at % 4 * 2),
          offset(static_cast<unsigned>(row * 128 + row % 8 * 16 + column * 2)) {}
    __device__ unsigned pair_at(const char* tile_begin, int vector, int below) const {
      return *reinterpret_cast<const unsigned*>(tile_begin +
                                                (offset ^ static_cast<unsigned>(vector % 8 * 16)) +
                                                vector / 8 * Panels::kPanel + below * 128);
    }
  };

  Work work;
  work.s = blockIdx.x / (in.groups * sums.parts);
  work.group = blockIdx.x / sums.parts % in.groups;
  work.part = blockIdx.x % sums.parts;
  const std::int64_t heads_of_part = (in.heads_per_group + sums.parts - 1) / sums.parts;
  work.first_head = static_cast<int>(work.group * in.heads_per_group + work.part * heads_of_part);
  work.last_head =
      static_cast<int>(min(work.first_head + heads_of_part, (work.group + 1) * in.heads_per_group));
  work.tiles = static_cast<int>(in.headdim / kChannels);
  work.items = max((work.last_head - work.first_head) * work.tiles, 0);
  const Segment chunk = chunks.at(work.s);
  const int count = static_cast<int>(chunk.count);

  // Copies of an item: dy and S by the second warpgroup, x and G by the third.
  const auto load_item = [&](int item) {
    if (item < work.items) {
      const unsigned at = tile + static_cast<unsigned>(At::stages + item % kStages * At::stage);
      const int head = work.first_head + item / work.tiles;
      const int channel0 = item % work.tiles * kChannels;
      const std::int64_t image = ((work.s * in.heads + work.first_head) * work.tiles + item) * At::kOfN;
      if (role == Role::C) {
        const T* dy = static_cast<const T*>(dout.data) + dout.offset(chunk.row, 0, head, channel0);
        load_panels<kChannels, kGroup>(at + At::dy, dy, dout.stride[1], kChannels, chunks, chunk, 0, thread);
        load_image<At::kOfN, kGroup>(at + At::S, static_cast<const char*>(states) + image, thread);
      } else {
        const T* x = static_cast<const T*>(in.x.data) + in.x.offset(chunk.row, 0, head, channel0);
        load_panels<kChannels, kGroup>(at + At::x, x, in.x.stride[1], kChannels, chunks, chunk, 0, thread);
        load_image<At::kOfN, kGroup>(at + At::G, static_cast<const char*>(gradients) + image, thread);
      }
    }
    cuda::commit_copies();
  };
  // By one warp, a head ahead.
  float dt[2] = {};
  const auto begin_head = [&](int head) {
    Values& values = values_of[(head - work.first_head) % 3];
    compute_steps(in, dt, bias_of(in, head), rate_of(in, head), count, lane, values.steps);
    if (lane == 0) values.D = in.D ? in.D.load(head, 0) : 0.0F;
    if (head + 1 < work.last_head) load_dt(in, chunks, chunk, head + 1, 0, lane, dt);
  };

  if (role == Role::C)
    load_panels<kN, kGroup>(tile + At::C,
                            static_cast<const T*>(in.C.data) + in.C.offset(chunk.row, 0, work.group, 0),
                            in.C.stride[1], in.d_state, chunks, chunk, 0, thread);
  if (role == Role::B)
    load_panels<kN, kGroup>(tile + At::B,
                            static_cast<const T*>(in.B.data) + in.B.offset(chunk.row, 0, work.group, 0),
                            in.B.stride[1], in.d_state, chunks, chunk, 0, thread);
  if (role != Role::pairs) {
    cuda::commit_copies();
    load_item(0);
    load_item(1);
    if (role == Role::C && warp == 0 && work.items > 0) {
      load_dt(in, chunks, chunk, work.first_head, 0, lane, dt);
      begin_head(work.first_head);
    }
    cuda::wait_for_copies<2>();
    cuda::fence_shared();
  }
  cuda::meet<kThreads>();  // B and C are there

  // At the top of each item: it and the head's steps are there, and what belongs to the one before is free.
  const auto next_item = [&](int item) {
    if (role != Role::pairs) {
      cuda::wait_for_copies<1>();
      cuda::fence_shared();
    }
    cuda::meet<kThreads>();
    if (role != Role::pairs) load_item(item + 2);
  };
  const auto stage_of = [&](int item) {
    return static_cast<unsigned>(At::stages + item % kStages * At::stage);
  };
  const auto values_at = [&](int item) -> Values& { return values_of[item / work.tiles % 3]; };

  if (role == Role::pairs) {
    cuda::take_registers<kPairsRegisters>();
    // (B C^T)_ji, rounded, in pairs of columns.
    unsigned bc[8][2];
    {
      float c[8][4];
      cuda::fence_sums();
#pragma unroll
      for (int k = 0; k < kN; k += 16)
        cuda::multiply_add_async<T, kAlong, kAlong>(c, describe<kTokens, kAlong>(tile + At::B, 0, k),
                                                    describe<kTokens, kAlong>(tile + At::C, 0, k), k > 0);
      cuda::commit_products();
      cuda::wait_for_products<0>();
      cuda::keep_registers(c);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        bc[n][0] = pack<T>(c[n][0], c[n][1]);
        bc[n][1] = pack<T>(c[n][2], c[n][3]);
      }
    }
    float W[8][4] = {};  // W^T, summed over heads
    float skip_sum = 0.0F;
    for (int item = 0; item < work.items; ++item) {
      next_item(item);
      const Place at_lane(afresh(lane), warp);
      const int head = work.first_head + item / work.tiles;
      const int channel0 = item % work.tiles * kChannels;
      const bool first_tile = channel0 == 0;
      Values& values = values_at(item);
      const Steps& steps = values.steps;
      const unsigned stage = stage_of(item);
      const unsigned x_at = tile + stage + At::x;
      const unsigned dy_at = tile + stage + At::dy;
      const unsigned G_at = tile + stage + At::G;
      const auto put = [&](Sum sum, int t, float value) {
        float& at = values.sums[sum][t];
        at = first_tile ? value : at + value;
      };

      float dM[8][4];
      float v[8][4];
      cuda::fence_sums();
#pragma unroll
      for (int k = 0; k < kChannels; k += 16)
        cuda::multiply_add_async<T, kAlong, kAlong>(dM, describe<kTokens, kAlong>(x_at, 0, k),
                                                    describe<kTokens, kAlong>(dy_at, 0, k), k > 0);
      cuda::commit_products();
#pragma unroll
      for (int k = 0; k < kN; k += 16)
        cuda::multiply_add_async<T, kAlong, kAlong>(v, describe<kTokens, kAlong>(tile + At::B, 0, k),
                                                    describe<kTokens, kAlong>(G_at, 0, k), k > 0);
      cuda::commit_products();
      const float a[2] = {steps.a[at_lane.row], steps.a[at_lane.row + 8]};
      const float d[2] = {steps.d[at_lane.row], steps.d[at_lane.row + 8]};
      cuda::wait_for_products<1>();
      cuda::keep_registers(dM);

      unsigned M[4][4];
      float row_sum[2] = {};
      float column_sum[8][2];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        column_sum[n][0] = column_sum[n][1] = 0.0F;
        unsigned& upper = M[n / 2][n % 2 * 2];
        unsigned& lower = M[n / 2][n % 2 * 2 + 1];
        upper = lower = 0;
        if (n / 2 < warp) continue;  // no i behind a j
        const float2 a_other = *reinterpret_cast<const float2*>(&steps.a[n * 8 + at_lane.column]);
        const float2 c_upper = unpack<T>(bc[n][0]);
        const float2 c_lower = unpack<T>(bc[n][1]);
        const float c[4] = {c_upper.x, c_upper.y, c_lower.x, c_lower.y};
        float m[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float weight = exp2_fast((k % 2 == 0 ? a_other.x : a_other.y) - a[k / 2]);
          if (n / 2 == warp) {
            const int i = n * 8 + at_lane.column + k % 2;
            const int j = at_lane.row + k / 2 * 8;
            if (i < j) weight = 0.0F;
            if (i == j) skip_sum += dM[n][k];
          }
          const float w = dM[n][k] * weight * d[k / 2];
          W[n][k] += w;
          m[k] = c[k] * weight;
          row_sum[k / 2] = fmaf(w, c[k], row_sum[k / 2]);
          column_sum[n][k % 2] = fmaf(w, c[k], column_sum[n][k % 2]);
        }
        upper = pack<T>(m[0], m[1]);
        lower = pack<T>(m[2], m[3]);
      }
      {
        const float2 sum = sum_of_columns(column_sum);
        const int n = at_lane.lane / 16 * 4 + at_lane.lane / 8 % 2 * 2 + at_lane.lane / 4 % 2;
        float2& at = *reinterpret_cast<float2*>(&values.sums[kRows + warp][n * 8 + at_lane.column]);
        at = first_tile ? sum : make_float2(at.x + sum.x, at.y + sum.y);
      }

      // v and dx.
      const float last = steps.a[kTokens - 1];
      const float to_end[2] = {exp2_fast(last - a[0]), exp2_fast(last - a[1])};
      float ends[2] = {};
      cuda::wait_for_products<0>();
      cuda::keep_registers(v);
#pragma unroll
      for (int p = 0; p < 8; ++p) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const float2 of_x = unpack<T>(at_lane.pair_at(shared + stage + At::x, p, k * 4));
          v[p][k] *= to_end[k / 2];
          v[p][k + 1] *= to_end[k / 2];
          ends[k / 2] = fmaf(v[p][k], of_x.x, fmaf(v[p][k + 1], of_x.y, ends[k / 2]));
        }
      }
      cuda::keep_registers(M);
      cuda::keep_registers(v);
      cuda::fence_sums();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        cuda::multiply_add_async<T, kAcross>(v, M[k], describe<kTokens, kAcross>(dy_at, k * 16, 0), 1);
      cuda::commit_products();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        row_sum[k] = sum_of_row(row_sum[k]);
        ends[k] = sum_of_row(ends[k]);
        if (at_lane.lane % 4 == 0) {
          put(kColumns, at_lane.row + k * 8, row_sum[k]);
          put(kEnds, at_lane.row + k * 8, ends[k]);
        }
      }
      const float skip = values.D;
      cuda::wait_for_products<0>();
      cuda::keep_registers(v);
      float dd[2] = {};
#pragma unroll
      for (int p = 0; p < 8; ++p) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const float2 of_x = unpack<T>(at_lane.pair_at(shared + stage + At::x, p, k * 4));
          const float2 of_dy = unpack<T>(at_lane.pair_at(shared + stage + At::dy, p, k * 4));
          dd[k / 2] = fmaf(v[p][k], of_x.x, fmaf(v[p][k + 1], of_x.y, dd[k / 2]));
          v[p][k] = fmaf(d[k / 2], v[p][k], skip * of_dy.x);
          v[p][k + 1] = fmaf(d[k / 2], v[p][k + 1], skip * of_dy.y);
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        dd[k] = sum_of_row(dd[k]);
        if (at_lane.lane % 4 == 0) put(kSteps, at_lane.row + k * 8, dd[k]);
      }
      if (channel0 + kChannels == in.headdim) {
        skip_sum = cuda::warp_sum(skip_sum);
        if (at_lane.lane == 0) values.skip[warp] = skip_sum;
        skip_sum = 0.0F;
      }
      if (to.dx) {
        // Through shared memory, rows of the warp's own, to stores of 16 bytes.
        store_sums<T>(tile + At::dx, warp * 16, v, at_lane.lane);
        __syncwarp();
        T* const out = static_cast<T*>(to.dx.data) + to.dx.offset(chunk.row, 0, head, channel0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = warp * 16 + i * 4 + at_lane.lane / 8;
          if (t >= count) continue;
          *reinterpret_cast<uint4*>(out + chunks.position(chunk, t) * to.dx.stride[1] +
                                    at_lane.lane % 8 * 8) =
              *reinterpret_cast<const uint4*>(shared + At::dx + Panels::offset(t, at_lane.lane % 8));
        }
        __syncwarp();
      }
    }
    __syncwarp();
    store_sums<T>(tile + At::dx, warp * 16, W, lane);
    cuda::fence_shared();
    cuda::meet<kThreads>();  // the sum of W^T and the sums of the last head are there
    return;
  }

  // Both others: their products, scaled by rows.
  cuda::give_registers<kOthersRegisters>();
  float d[kN / 8][4] = {};
  for (int item = 0; item < work.items; ++item) {
    next_item(item);
    const int head = work.first_head + item / work.tiles;
    const bool first_tile = item % work.tiles == 0;
    Values& values = values_at(item);
    const Steps& steps = values.steps;
    const unsigned stage = stage_of(item);
    const Place at_lane(afresh(lane), warp);
    const unsigned left = tile + stage + (role == Role::C ? At::dy : At::x);
    const unsigned right = tile + stage + (role == Role::C ? At::S : At::G);
    if (role == Role::C && first_tile) {
      if (warp == 0 && head + 1 < work.last_head) begin_head(head + 1);
      if (warp == 1 && head > work.first_head)
        finish_head(in, chunks, chunk, work.s, head - 1, values_at(item - 1), to, sums);
      __syncwarp();
    }
    float c[kN / 8][4];
    cuda::fence_sums();
#pragma unroll
    for (int k = 0; k < kChannels; k += 16)
      cuda::multiply_add_async<T, kAlong, kAcross>(c, describe<kTokens, kAlong>(left, 0, k),
                                                   describe<kTokens, kAcross>(right, k, 0), k > 0);
    cuda::commit_products();
    if (role == Role::C) {
      cuda::wait_for_products<0>();
      cuda::keep_registers(c);
      const float factor[2] = {steps.start[at_lane.row], steps.start[at_lane.row + 8]};
      float off[2] = {};
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const float2 of_C = unpack<T>(at_lane.pair_at(shared + At::C, n, k * 4));
          off[k / 2] = fmaf(c[n][k], of_C.x, fmaf(c[n][k + 1], of_C.y, off[k / 2]));
          d[n][k] = fmaf(factor[k / 2], c[n][k], d[n][k]);
          d[n][k + 1] = fmaf(factor[k / 2], c[n][k + 1], d[n][k + 1]);
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        off[k] = sum_of_row(off[k]) * factor[k];
        float& at = values.sums[kStart][at_lane.row + k * 8];
        if (at_lane.lane % 4 == 0) at = first_tile ? off[k] : at + off[k];
      }
    } else {
      // <G, S>: the tiles lie alike.
      float through = 0.0F;
#pragma unroll 4
      for (int i = thread * 16; i < At::kOfN; i += kGroup * 16) {
        const uint4 u = *reinterpret_cast<const uint4*>(shared + stage + At::S + i);
        const uint4 v = *reinterpret_cast<const uint4*>(shared + stage + At::G + i);
        const unsigned of_S[4] = {u.x, u.y, u.z, u.w};
        const unsigned of_G[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 p = unpack<T>(of_S[k]);
          const float2 q = unpack<T>(of_G[k]);
          through = fmaf(p.x, q.x, fmaf(p.y, q.y, through));
        }
      }
      through = cuda::warp_sum(through);
      if (at_lane.lane == 0) values.through[warp] = first_tile ? through : values.through[warp] + through;
      cuda::wait_for_products<0>();
      cuda::keep_registers(c);
      const float factor[2] = {steps.left[at_lane.row], steps.left[at_lane.row + 8]};
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) d[n][k] = fmaf(factor[k / 2], c[n][k], d[n][k]);
      }
    }
  }
  cuda::meet<kThreads>();  // the sum of W^T and the sums of the last head are there
  if (role == Role::C && warp == 1 && work.items > 0)
    finish_head(in, chunks, chunk, work.s, work.last_head - 1, values_at(work.items - 1), to, sums);
  __syncwarp();
  cuda::keep_registers(d);
  cuda::fence_sums();
#pragma unroll
  for (int k = 0; k < kTokens; k += 16) {
    if (role == Role::C)
      cuda::multiply_add_async<T, kAcross, kAcross>(d, describe<kTokens, kAcross>(tile + At::dx, k, 0),
                                                    describe<kTokens, kAcross>(tile + At::B, k, 0), 1);
    else
      cuda::multiply_add_async<T, kAlong, kAcross>(d, describe<kTokens, kAlong>(tile + At::dx, 0, k),
                                                   describe<kTokens, kAcross>(tile + At::C, k, 0), 1);
  }
  cuda::commit_products();
  cuda::wait_for_products<0>();
  cuda::keep_registers(d);
  store_part<kN>(role == Role::C ? sums.dC : sums.dB, in, chunks, chunk, work, sums.stride,
                 warp * 16 + lane / 4, d);
#endif
}

}  // namespace

std::int64_t warpgroup_columns(std::int64_t d_state) { return d_state <= 64 ? 64 : 128; }

int warpgroup_backward_shared_memory() { return Layout<128>::total; }

void warpgroup_backward(Context& ctx, const Inputs& in, const Segments& chunks, const Tensor& dout,
                        const StateTiles& tiles, const Gradients& to, const Sums& sums) {
  const std::int64_t blocks = chunks.count * in.groups * sums.parts;
  if (blocks == 0) return;
  cuda::dispatch_element(in.x.dtype, "[ssd_backward] x", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto with = [&](auto kernel, int shared) {
        cuda::launch(ctx, "ssd_backward chunks", kernel, static_cast<unsigned>(blocks), kThreads,
                     static_cast<std::size_t>(shared), in, chunks, AnyView<4>(dout),
                     static_cast<const void*>(tiles.states.raw()),
                     static_cast<const void*>(tiles.gradients.raw()), to, sums);
      };
      if (in.d_state <= 64)
        with(warpgroup_backward_kernel<T, 64>, Layout<64>::total);
      else
        with(warpgroup_backward_kernel<T, 128>, Layout<128>::total);
    }
  });
}

}  // namespace krait::ssd_detail
