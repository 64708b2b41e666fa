// The backward of chunks on tensor cores. The state S before each chunk and the gradient G by the state after
// it are in memory, so that chunks are worked on side by side: a block takes one chunk and, in turn, some
// heads of a group, 64 channels at a time. With E_ij = exp(a_i - a_j) for i >= j, else 0,
//   dM = dy x^T             W_ij = dM_ij E_ij d_j          M_ij = (C B^T)_ij E_ij
//   v_j  = exp(a_last - a_j) G B_j + sum over i of M_ij dy_i            dx_j = d_j v_j + D dy_j
//   dC_i = exp(a_i) dy_i^T S + sum over j of W_ij B_j
//   dB_j = exp(a_last - a_j) d_j x_j^T G + sum over i of W_ij C_i
// dB and dC are summed over the heads in registers; their second terms are one product each for the sum of W.
// The gradient by the exponent d_t A is
//   sum over i >= t of (sum over j of T_ij - sum over j of T_ji + dC'_i . C_i) + sum over j < t of d_j x_j .
//   v'_j
//     + exp(a_last) <G, S>,          T = W (C B^T) by elements, ' the first terms.
// Rounded to 16 bits as operands are S, G, M, the sum of W, and x and dy with their factors.
#include <algorithm>
#include <type_traits>

#include "ops/ssd/cuda/backward.cuh"
#include "ops/ssd/cuda/chunks.cuh"

namespace krait::ssd_detail {
namespace {

// Warp w of 8 has the strip w % 4 of 16 rows, and half w / 4 of the columns.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStrips = 4;
constexpr int kClerk = 4;  // the warp that has no pairs; it keeps the values of the heads

// Sums of one value for each token. What several warps have a part of is kept apart by them, and added in
// order.
enum Sum {
  kRows,                       // of T by rows, and of dC' . C: two halves of the columns
  kColumns = kRows + 2,        // of T by columns: four strips of rows
  kEnds = kColumns + kStrips,  // x . v': two halves
  kSteps = kEnds + 2,          // x . v: two halves
  kSums = kSteps + 2,
};

// Values of a head.
struct Values {
  Steps steps;
  float sums[kSums][kTokens];
  float through[kWarps];  // <G, S>
  float skip[kWarps];     // <dy, x>
};

// Bytes from the begin of dynamic shared memory. What belongs to a head is there twice: while one is worked
// on, the next one is copied.
template <int kN>
struct Layout {
  static constexpr int kRowsOfN = kTokens * kN * 2;
  static constexpr int kRowsOfP = kTokens * kChannels * 2;
  static constexpr int B = 0;
  static constexpr int C = B + kRowsOfN;
  static constexpr int M = C + kRowsOfN;  // (tokens, tokens); at the end the sum of W
  static constexpr int dx = M + kTokens * kTokens * 2;
  static constexpr int heads = dx + kRowsOfP;
  // Of a head, from its begin.
  static constexpr int x = 0;
  static constexpr int dy = x + kRowsOfP;
  static constexpr int S = dy + kRowsOfP;  // (channels, N)
  static constexpr int G = S + kChannels * kN * 2;
  static constexpr int head = G + kChannels * kN * 2;
  static constexpr int values = heads + 2 * head;
  static constexpr int total = values + 2 * static_cast<int>(sizeof(Values));
};

// The sum over the four lanes that share a row of a fragment.
__device__ __forceinline__ float sum_of_row(float v) {
  v += __shfl_xor_sync(0xffffffffU, v, 1);
  return v + __shfl_xor_sync(0xffffffffU, v, 2);
}
// The sum over the eight lanes that share columns of a fragment.
__device__ __forceinline__ float sum_of_column(float v) {
  v += __shfl_xor_sync(0xffffffffU, v, 4);
  v += __shfl_xor_sync(0xffffffffU, v, 8);
  return v + __shfl_xor_sync(0xffffffffU, v, 16);
}

// Multiplies the rows of a left operand.
template <typename T>
__device__ __forceinline__ void scale_rows(unsigned (&a)[4], float upper, float lower) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float factor = k % 2 == 0 ? upper : lower;
    const float2 v = unpack<T>(a[k]);
    a[k] = pack<T>(v.x * factor, v.y * factor);
  }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    chunked_backward_kernel(Inputs in, Segments chunks, AnyView<4> dout, const T* states, const T* gradients,
                            Gradients to, Sums sums) {
  using At = Layout<kN>;
  constexpr int kHalf = kN / 2;  // columns of the state that a warp has
  extern __shared__ __align__(1024) float4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  const unsigned tile = shared_address(shared_memory);
  Values* const values_of = reinterpret_cast<Values*>(shared + At::values);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int strip = warp % kStrips;
  const int half = warp / kStrips;
  const int row = strip * 16 + lane / 4;  // of the lane's sums, and 8 more
  const int column = lane % 4 * 2;        // of a fragment, and the next
  // Two neighbours at column `at` of a tile.
  const auto pair_at = [&](int tile_begin, unsigned offset) -> unsigned& {
    return *reinterpret_cast<unsigned*>(shared + tile_begin + offset);
  };

  const std::int64_t s = blockIdx.x / (in.groups * sums.parts);
  const std::int64_t group = blockIdx.x / sums.parts % in.groups;
  const std::int64_t part = blockIdx.x % sums.parts;
  const Segment chunk = chunks.at(s);
  const int count = static_cast<int>(chunk.count);
  const std::int64_t heads_of_part = (in.heads_per_group + sums.parts - 1) / sums.parts;
  const std::int64_t first_head = group * in.heads_per_group + part * heads_of_part;
  const std::int64_t last_head = min(first_head + heads_of_part, (group + 1) * in.heads_per_group);

  const T* x = static_cast<const T*>(in.x.data) + in.x.offset(chunk.row, 0, 0, 0);
  const T* dy = static_cast<const T*>(dout.data) + dout.offset(chunk.row, 0, 0, 0);
  const auto load_head = [&](std::int64_t head, std::int64_t channel0, int buffer) {
    const unsigned at = tile + At::heads + static_cast<unsigned>(buffer * At::head);
    load_tile<kChannels, kThreads>(at + At::x, x + head * in.x.stride[2] + channel0, in.x.stride[1],
                                   kChannels, chunks, chunk, 0);
    load_tile<kChannels, kThreads>(at + At::dy, dy + head * dout.stride[2] + channel0, dout.stride[1],
                                   kChannels, chunks, chunk, 0);
    const std::int64_t state = ((s * in.heads + head) * in.headdim + channel0) * in.d_state;
    static_assert(kChannels == kTokens);
    load_rows<kN, kThreads>(at + At::S, states + state, in.d_state);
    load_rows<kN, kThreads>(at + At::G, gradients + state, in.d_state);
  };

  float dt[2] = {};  // of the clerk: of the next head whose steps are to be computed
  load_tile<kN, kThreads>(tile + At::B,
                          static_cast<const T*>(in.B.data) + in.B.offset(chunk.row, 0, group, 0),
                          in.B.stride[1], in.d_state, chunks, chunk, 0);
  load_tile<kN, kThreads>(tile + At::C,
                          static_cast<const T*>(in.C.data) + in.C.offset(chunk.row, 0, group, 0),
                          in.C.stride[1], in.d_state, chunks, chunk, 0);
  if (first_head < last_head) {
    load_head(first_head, 0, 0);
    if (warp == kClerk) {
      load_dt(in, chunks, chunk, first_head, 0, lane, dt);
      compute_steps(in, dt, bias_of(in, first_head), rate_of(in, first_head), count, lane,
                    values_of[0].steps);
      if (first_head + 1 < last_head) load_dt(in, chunks, chunk, first_head + 1, 0, lane, dt);
    }
    for (int i = thread; i < 2 * kSums * kTokens; i += kThreads)
      values_of[i / (kSums * kTokens)].sums[i / kTokens % kSums][i % kTokens] = 0.0F;
  }
  wait_for_copies();
  __syncthreads();

  // C B^T of the lane's elements, rounded: 16 rows and 32 columns a warp, in pairs of columns.
  unsigned cb[4][2] = {};
#pragma unroll
  for (int jj = 0; jj < 2; ++jj) {
    const int j = half * 2 + jj;
    if (j > strip) continue;
    float c[2][4] = {};
#pragma unroll
    for (int k = 0; k < kN / 8; k += 2) {
      unsigned a[4];
      unsigned b[4];
      load_a<kN>(a, tile + At::C, strip * 16, k);
      load_b_transposed<kN>(b, tile + At::B, j * 16, k);
      multiply_add<T>(c[0], a, b[0], b[1]);
      multiply_add<T>(c[1], a, b[2], b[3]);
    }
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      cb[2 * jj + q][0] = pack<T>(c[q][0], c[q][1]);
      cb[2 * jj + q][1] = pack<T>(c[q][2], c[q][3]);
    }
  }

  float W[4][4] = {};  // summed over heads
  float dC[kHalf / 8][4] = {};
  float dB[kHalf / 8][4] = {};

  // Of a head whose sums are there, by the clerk.
  const auto finish = [&](std::int64_t head, const Values& values) {
    const float rate = rate_of(in, head);
    // Tokens `lane` and `lane` + 32.
    float from_end[2];    // to be summed over i >= t
    float from_start[2];  // over j < t
    float own[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = lane + i * 32;
      const auto sum = [&](int which) { return values.sums[which][t] + values.sums[which + 1][t]; };
      from_end[i] = sum(kRows) - (sum(kColumns) + sum(kColumns + 2));
      own[i] = from_start[i] = values.steps.d[t] * sum(kEnds);
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const float after = __shfl_down_sync(0xffffffffU, from_end[i], distance);
        if (lane + distance < 32) from_end[i] += after;
        const float before = __shfl_up_sync(0xffffffffU, from_start[i], distance);
        if (lane >= distance) from_start[i] += before;
      }
    }
    from_end[0] += __shfl_sync(0xffffffffU, from_end[1], 0);
    from_start[1] += __shfl_sync(0xffffffffU, from_start[0], 31);
    float state = 0.0F;
    float dD = 0.0F;
    for (int w = 0; w < kWarps; ++w) {
      state += values.through[w];
      dD += values.skip[w];
    }
    state *= exp2_fast(values.steps.a[kTokens - 1]);

    float dA = 0.0F;
    float ddt_bias = 0.0F;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = lane + i * 32;
      if (t >= count) continue;
      const float exponent = from_end[i] + (from_start[i] - own[i]) + state;
      dA = fmaf(values.steps.d[t], exponent, dA);
      const float dd =
          fmaf(rate, exponent, values.sums[kSteps][t] + values.sums[kSteps + 1][t]) * values.steps.slope[t];
      ddt_bias += dd;
      if (to.ddt) to.ddt.store(dd, chunk.row, chunks.position(chunk, t), head);
    }
    dA = cuda::warp_sum(dA);
    ddt_bias = cuda::warp_sum(ddt_bias);
    if (lane == 0) {
      if (sums.dA != nullptr) sums.dA[s * in.heads + head] = dA;
      if (sums.ddt_bias != nullptr) sums.ddt_bias[s * in.heads + head] = ddt_bias;
      if (sums.dD != nullptr) sums.dD[s * in.heads + head] = dD;
    }
  };

  const std::int64_t tiles = in.headdim / kChannels;
  const std::int64_t items = (last_head - first_head) * tiles;
  float through = 0.0F;
  float skip_sum = 0.0F;
  for (std::int64_t item = 0; item < items; ++item) {
    const std::int64_t head = first_head + item / tiles;
    const std::int64_t channel0 = item % tiles * kChannels;
    const int parity = static_cast<int>((head - first_head) % 2);
    Values& values = values_of[parity];
    const Steps& steps = values.steps;
    wait_for_copies();
    __syncthreads();  // this head is there, and what belongs to the one before is free
    if (item + 1 < items)
      load_head(first_head + (item + 1) / tiles, (item + 1) % tiles * kChannels,
                static_cast<int>((item + 1) % 2));
    if (warp == kClerk && channel0 == 0) {
      Values& others = values_of[1 - parity];
      if (head > first_head) finish(head - 1, others);
      __syncwarp();
      if (head + 1 < last_head) {
        compute_steps(in, dt, bias_of(in, head + 1), rate_of(in, head + 1), count, lane, others.steps);
        if (head + 2 < last_head) load_dt(in, chunks, chunk, head + 2, 0, lane, dt);
      }
    }
    const int at_head = At::heads + static_cast<int>(item % 2) * At::head;
    const int x_tile = at_head + At::x;
    const int dy_tile = at_head + At::dy;
    const int S_tile = at_head + At::S;
    const int G_tile = at_head + At::G;
    {
      const float a[2] = {steps.a[row], steps.a[row + 8]};

      // Pairs of tokens.
#pragma unroll
      for (int jj = 0; jj < 2; ++jj) {
        const int j = half * 2 + jj;
        if (j > strip) continue;
        float dM[2][4] = {};
#pragma unroll
        for (int k = 0; k < kChannels / 8; k += 2) {
          unsigned left[4];
          unsigned b[4];
          load_a<kChannels>(left, tile + static_cast<unsigned>(dy_tile), strip * 16, k);
          load_b_transposed<kChannels>(b, tile + static_cast<unsigned>(x_tile), j * 16, k);
          multiply_add<T>(dM[0], left, b[0], b[1]);
          multiply_add<T>(dM[1], left, b[2], b[3]);
        }
        float row_sum[2] = {};
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const int other = j * 16 + q * 8 + column;
          const float2 a_other = *reinterpret_cast<const float2*>(&steps.a[other]);
          const float2 d_other = *reinterpret_cast<const float2*>(&steps.d[other]);
          const float2 upper = unpack<T>(cb[2 * jj + q][0]);
          const float2 lower = unpack<T>(cb[2 * jj + q][1]);
          const float c[4] = {upper.x, upper.y, lower.x, lower.y};
          float m[4];
          float column_sum[2] = {};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int i = row + k / 2 * 8;
            const bool pair = j < strip || other + k % 2 <= i;
            const float weight = pair ? exp2_fast(a[k / 2] - (k % 2 == 0 ? a_other.x : a_other.y)) : 0.0F;
            const float w = dM[q][k] * (weight * (k % 2 == 0 ? d_other.x : d_other.y));
            W[2 * jj + q][k] += w;
            m[k] = c[k] * weight;
            const float t = w * c[k];
            row_sum[k / 2] += t;
            column_sum[k % 2] += t;
          }
          const unsigned at = pair_offset<kTokens>(row, j * 2 + q, column);
          pair_at(At::M, at) = pack<T>(m[0], m[1]);
          const unsigned below = pair_offset<kTokens>(row + 8, j * 2 + q, column);
          pair_at(At::M, below) = pack<T>(m[2], m[3]);
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            column_sum[k] = sum_of_column(column_sum[k]);
            if (lane / 4 == 0) values.sums[kColumns + strip][other + k] += column_sum[k];
          }
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          row_sum[k] = sum_of_row(row_sum[k]);
          if (lane % 4 == 0) values.sums[kRows + half][row + k * 8] += row_sum[k];
        }
      }

      // dC through the state before the chunk, dB through the one after it.
      {
        unsigned left[kChannels / 16][4];
        const float factor[2] = {steps.start[row], steps.start[row + 8]};
#pragma unroll
        for (int k = 0; k < kChannels / 16; ++k) {
          load_a<kChannels>(left[k], tile + static_cast<unsigned>(dy_tile), strip * 16, 2 * k);
          scale_rows<T>(left[k], factor[0], factor[1]);
        }
        float off[2] = {};
#pragma unroll
        for (int n = 0; n < kHalf / 8; n += 2) {
          const int vector = half * (kHalf / 8) + n;
          float c[2][4] = {};
#pragma unroll
          for (int k = 0; k < kChannels / 16; ++k) {
            unsigned b[4];
            load_b<kN>(b, tile + static_cast<unsigned>(S_tile), k * 16, vector);
            multiply_add<T>(c[0], left[k], b[0], b[1]);
            multiply_add<T>(c[1], left[k], b[2], b[3]);
          }
#pragma unroll
          for (int q = 0; q < 2; ++q) {
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
              const unsigned at = pair_offset<kN>(row + k * 4, vector + q, column);
              const float2 of_C = unpack<T>(pair_at(At::C, at));
              off[k / 2] = fmaf(c[q][k], of_C.x, fmaf(c[q][k + 1], of_C.y, off[k / 2]));
              dC[n + q][k] += c[q][k];
              dC[n + q][k + 1] += c[q][k + 1];
            }
          }
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          off[k] = sum_of_row(off[k]);
          if (lane % 4 == 0) values.sums[kRows + half][row + k * 8] += off[k];
        }
      }
      {
        const float factor[2] = {steps.left[row], steps.left[row + 8]};
#pragma unroll
        for (int k = 0; k < kChannels / 16; ++k) {
          unsigned left[4];
          load_a<kChannels>(left, tile + static_cast<unsigned>(x_tile), strip * 16, 2 * k);
          scale_rows<T>(left, factor[0], factor[1]);
#pragma unroll
          for (int n = 0; n < kHalf / 8; n += 2) {
            unsigned b[4];
            load_b<kN>(b, tile + static_cast<unsigned>(G_tile), k * 16, half * (kHalf / 8) + n);
            multiply_add<T>(dB[n], left, b[0], b[1]);
            multiply_add<T>(dB[n + 1], left, b[2], b[3]);
          }
        }
      }
      // <G, S>: the tiles lie alike.
#pragma unroll
      for (int i = 0; i < kChannels * kN / 8; i += kThreads) {
        const uint4 u = *reinterpret_cast<const uint4*>(shared + S_tile + (i + thread) * 16);
        const uint4 v = *reinterpret_cast<const uint4*>(shared + G_tile + (i + thread) * 16);
        const unsigned of_S[4] = {u.x, u.y, u.z, u.w};
        const unsigned of_G[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 p = unpack<T>(of_S[k]);
          const float2 q = unpack<T>(of_G[k]);
          through = fmaf(p.x, q.x, fmaf(p.y, q.y, through));
        }
      }
      __syncthreads();  // M is there

      // v and dx: 16 tokens and 32 channels a warp.
      {
        float v[4][4] = {};
#pragma unroll
        for (int k = 0; k < kN / 8; k += 2) {
          unsigned left[4];
          load_a<kN>(left, tile + At::B, strip * 16, k);
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            unsigned b[4];
            load_b_transposed<kN>(b, tile + static_cast<unsigned>(G_tile), half * 32 + p * 16, k);
            multiply_add<T>(v[2 * p], left, b[0], b[1]);
            multiply_add<T>(v[2 * p + 1], left, b[2], b[3]);
          }
        }
        const float last = steps.a[kTokens - 1];
        const float to_end[2] = {exp2_fast(last - a[0]), exp2_fast(last - a[1])};
        float ends[2] = {};
#pragma unroll
        for (int p = 0; p < 4; ++p) {
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            const unsigned at = pair_offset<kChannels>(row + k * 4, half * 4 + p, column);
            const float2 of_x = unpack<T>(pair_at(x_tile, at));
            v[p][k] *= to_end[k / 2];
            v[p][k + 1] *= to_end[k / 2];
            ends[k / 2] = fmaf(v[p][k], of_x.x, fmaf(v[p][k + 1], of_x.y, ends[k / 2]));
          }
        }
#pragma unroll
        for (int i = 0; i < kTokens / 16; ++i) {
          if (i < strip) continue;
          unsigned left[4];
          load_a_transposed<kTokens>(left, tile + At::M, i * 16, strip * 2);
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            unsigned b[4];
            load_b<kChannels>(b, tile + static_cast<unsigned>(dy_tile), i * 16, half * 4 + 2 * p);
            multiply_add<T>(v[2 * p], left, b[0], b[1]);
            multiply_add<T>(v[2 * p + 1], left, b[2], b[3]);
          }
        }
        const float skip = in.D ? in.D.load(head, 0) : 0.0F;
        float dd[2] = {};
#pragma unroll
        for (int p = 0; p < 4; ++p) {
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            const unsigned at = pair_offset<kChannels>(row + k * 4, half * 4 + p, column);
            const float2 of_x = unpack<T>(pair_at(x_tile, at));
            const float2 of_dy = unpack<T>(pair_at(dy_tile, at));
            const float d = steps.d[row + k * 4];
            dd[k / 2] = fmaf(v[p][k], of_x.x, fmaf(v[p][k + 1], of_x.y, dd[k / 2]));
            skip_sum = fmaf(of_x.x, of_dy.x, fmaf(of_x.y, of_dy.y, skip_sum));
            pair_at(At::dx, at) =
                pack<T>(fmaf(d, v[p][k], skip * of_dy.x), fmaf(d, v[p][k + 1], skip * of_dy.y));
          }
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          ends[k] = sum_of_row(ends[k]);
          dd[k] = sum_of_row(dd[k]);
          if (lane % 4 == 0) {
            values.sums[kEnds + half][row + k * 8] += ends[k];
            values.sums[kSteps + half][row + k * 8] += dd[k];
          }
        }
      }
      if (to.dx) {
        __syncwarp();  // dx of the warp is there
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int t = strip * 16 + i * 8 + lane / 4;
          const int vector = half * 4 + lane % 4;
          if (t >= count) continue;
          const std::int64_t at =
              to.dx.offset(chunk.row, chunks.position(chunk, t), head, channel0 + vector * 8);
          *reinterpret_cast<uint4*>(static_cast<T*>(to.dx.data) + at) =
              *reinterpret_cast<const uint4*>(shared + At::dx + tile_offset<kChannels>(t, vector));
        }
        __syncwarp();
      }
    }
    if (channel0 + kChannels == in.headdim) {
      through = cuda::warp_sum(through);
      skip_sum = cuda::warp_sum(skip_sum);
      if (lane == 0) {
        values.through[warp] = through;
        values.skip[warp] = skip_sum;
      }
      through = skip_sum = 0.0F;
      // The clerk had finished with those of the head before when M was there.
      for (int i = thread; i < kSums * kTokens; i += kThreads)
        values_of[1 - parity].sums[i / kTokens][i % kTokens] = 0.0F;
    }
  }
  __syncthreads();
  if (warp == kClerk && items > 0) finish(last_head - 1, values_of[(last_head - 1 - first_head) % 2]);

    // What the pairs of all heads have.
#pragma unroll
  for (int jj = 0; jj < 2; ++jj) {
    const int j = half * 2 + jj;
    if (j > strip) continue;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const unsigned at = pair_offset<kTokens>(row + k * 4, j * 2 + q, column);
        pair_at(At::M, at) = pack<T>(W[2 * jj + q][k], W[2 * jj + q][k + 1]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    unsigned left[4];
    if (k <= strip) {
      load_a<kTokens>(left, tile + At::M, strip * 16, 2 * k);
#pragma unroll
      for (int n = 0; n < kHalf / 8; n += 2) {
        unsigned b[4];
        load_b<kN>(b, tile + At::B, k * 16, half * (kHalf / 8) + n);
        multiply_add<T>(dC[n], left, b[0], b[1]);
        multiply_add<T>(dC[n + 1], left, b[2], b[3]);
      }
    }
    if (k >= strip) {
      load_a_transposed<kTokens>(left, tile + At::M, k * 16, strip * 2);
#pragma unroll
      for (int n = 0; n < kHalf / 8; n += 2) {
        unsigned b[4];
        load_b<kN>(b, tile + At::C, k * 16, half * (kHalf / 8) + n);
        multiply_add<T>(dB[n], left, b[0], b[1]);
        multiply_add<T>(dB[n + 1], left, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const int t = row + k * 4;
    if (t >= count) continue;
    const std::int64_t token = chunk.row * chunks.length + chunks.position(chunk, t);
    const std::int64_t at = part * sums.stride + (token * in.groups + group) * in.d_state;
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n) {
      const int to_column = half * kHalf + n * 8 + column;
      if (to_column >= in.d_state) continue;
      if (sums.dC != nullptr)
        *reinterpret_cast<float2*>(sums.dC + at + to_column) = make_float2(dC[n][k], dC[n][k + 1]);
      if (sums.dB != nullptr)
        *reinterpret_cast<float2*>(sums.dB + at + to_column) = make_float2(dB[n][k], dB[n][k + 1]);
    }
  }
}

}  // namespace

int chunked_backward_shared_memory() { return Layout<128>::total; }

void chunked_backward(Context& ctx, const Inputs& in, const Segments& chunks, const Tensor& dout,
                      const Tensor& states, const Tensor& gradients, const Gradients& to, const Sums& sums) {
  const std::int64_t blocks = chunks.count * in.groups * sums.parts;
  if (blocks == 0) return;
  cuda::dispatch_element(in.x.dtype, "[ssd_backward] x", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto with = [&](auto kernel, int shared) {
        cuda::launch(ctx, "ssd_backward chunks", kernel, static_cast<unsigned>(blocks), kThreads,
                     static_cast<std::size_t>(shared), in, chunks, AnyView<4>(dout),
                     static_cast<const T*>(states.raw()), static_cast<const T*>(gradients.raw()), to, sums);
      };
      if (in.d_state <= 64)
        with(chunked_backward_kernel<T, 64>, Layout<64>::total);
      else
        with(chunked_backward_kernel<T, 128>, Layout<128>::total);
    }
  });
}

}  // namespace krait::ssd_detail
