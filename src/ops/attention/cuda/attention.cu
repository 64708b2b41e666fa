// The forward on a GPU. Blocks of 64 rows take tiles; up to eight rows, as in decoding, take a kernel that
// reads keys and values once for all of them. Both can divide the keys into parts, joined in order.
#include <algorithm>
#include <cmath>

#include "core/cuda/elements.cuh"
#include "ops/attention/cuda/tile.cuh"

namespace krait::attention_kernels {
namespace gpu {
namespace {

constexpr int kThreads = kTileThreads;

// The results of a part of the keys, all f32: out not yet divided by the sum of the weights, and for each row
// the largest score and the sum, both of powers of two.
struct Partials {
  float* out;    // (splits, Hkv, rows, head_dim_v)
  float* state;  // (splits, Hkv, rows, 2)
};

struct Task {
  std::int64_t head_kv;
  std::int64_t row;      // the first one
  std::int64_t channel;  // the first one of the values
  std::int64_t split;
};

// Tasks that share keys and values are neighbours.
__device__ Task task_of(std::int64_t index, const GpuPlan& plan, std::int64_t heads_kv) {
  Task t{};
  t.row = index % plan.row_blocks * plan.rows_of_block;
  index /= plan.row_blocks;
  t.channel = index % plan.channel_blocks * plan.channels_of_block;
  index /= plan.channel_blocks;
  t.head_kv = index % heads_kv;
  t.split = index / heads_kv;
  return t;
}

__device__ __forceinline__ float rescale(float before, float now) {
  return before == now ? 1.0F : exp2f(before - now);
}

// The row's result where there is one part of the keys, else the part's.
__device__ __forceinline__ void store_state(const Problem& p, const Partials& partials, const Task& t,
                                            bool whole, std::int64_t row, float largest, float total) {
  if (whole) {
    if (p.logsumexp.data == nullptr) return;
    const std::int64_t at = offset_of_row(p.logsumexp, row / p.group, t.head_kv * p.group + row % p.group);
    cuda::store_float(p.logsumexp.data, p.logsumexp.dtype, at, (largest + log2f(total)) * kLn2);
    return;
  }
  float* to = partials.state + ((t.split * p.heads_kv + t.head_kv) * p.queries * p.group + row) * 2;
  to[0] = largest;
  to[1] = total;
}

__device__ __forceinline__ void store_out(const Problem& p, const Partials& partials, const Task& t,
                                          bool whole, std::int64_t row, std::int64_t channel, float sum,
                                          float total) {
  if (whole) {
    const std::int64_t at = offset_of_row(p.out, row / p.group, t.head_kv * p.group + row % p.group);
    cuda::store_float(p.out.data, p.out.dtype, at + channel * p.out.channel_stride,
                      total == 0.0F ? 0.0F : sum / total);
    return;
  }
  partials.out[((t.split * p.heads_kv + t.head_kv) * p.queries * p.group + row) * p.head_dim_v + channel] =
      sum;
}

__global__ void __launch_bounds__(kThreads)
    tile_kernel(Problem p, GpuPlan plan, std::int64_t tasks, Partials partials) {
  __shared__ Stage a_stage;
  __shared__ Stage b_stage;
  __shared__ Weights weights;
  __shared__ Rows rows;
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const bool whole = plan.splits == 1;
  const float scale = static_cast<float>(p.scale) * kLog2E;
  for (std::int64_t index = blockIdx.x; index < tasks; index += gridDim.x) {
    const Task t = task_of(index, plan, p.heads_kv);
    __syncthreads();
    place_rows(p, p.q, t.head_kv, t.row, rows);
    __syncthreads();
    float largest[4];
    float total[4] = {};
    float out[4][4] = {};
    std::int64_t visible[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      largest[i] = -INFINITY;
      visible[i] = rows.visible[ty + 16 * i];
    }
    const std::int64_t last_row = min(t.row + kTile, p.queries * p.group) - 1 - t.row;
    const std::int64_t end = min((t.split + 1) * plan.keys_of_split, rows.visible[last_row]);
    for (std::int64_t key = t.split * plan.keys_of_split; key < end; key += kTile) {
      float score[4][4];
      multiply_rows_by_keys(p.q, rows.q, p.k, t.head_kv, key, p.keys, p.head_dim, a_stage, b_stage, score);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float most = largest[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          score[i][j] *= scale;
          if (key + tx + 16 * j < visible[i]) most = fmaxf(most, score[i][j]);
        }
        for (int step = 8; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, step));
        const float factor = rescale(largest[i], most);
        largest[i] = most;
        float sum = 0.0F;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool seen = key + tx + 16 * j < visible[i] && score[i][j] != -INFINITY;
          const float weight = seen ? exp2f(score[i][j] - most) : 0.0F;
          weights.at[ty + 16 * i][tx + 16 * j] = weight;
          sum += weight;
          out[i][j] *= factor;
        }
        for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffU, sum, step);
        total[i] = total[i] * factor + sum;
      }
      add_weighted_keys(weights, p.v, t.head_kv, key, p.keys, t.channel, p.head_dim_v, a_stage, out);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t row = t.row + ty + 16 * i;
      if (row >= p.queries * p.group) continue;
      if (tx == 0 && t.channel == 0) store_state(p, partials, t, whole, row, largest[i], total[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::int64_t channel = t.channel + tx + 16 * j;
        if (channel < p.head_dim_v) store_out(p, partials, t, whole, row, channel, out[i][j], total[i]);
      }
    }
  }
}

// Channels c .. c + 7 of a line that begins at `begin`, zeros from `width` on.
__device__ __forceinline__ void load_eight(const Operand& o, bool packed, std::int64_t begin, std::int64_t c,
                                           std::int64_t width, float (&to)[8]) {
  if (packed && c + 8 <= width) {
    if (o.dtype == DType::f32) {
      const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(o.data) + begin + c);
      const float4 a = from[0];
      const float4 b = from[1];
      to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
      to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
      return;
    }
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(o.data) + begin + c);
    const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (o.dtype == DType::bf16) {
        to[2 * i] = __uint_as_float(pairs[i] << 16);
        to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000U);
      } else {
        to[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(pairs[i] & 0xffffU)));
        to[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(pairs[i] >> 16)));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    to[i] = c + i < width ? cuda::load_float(o.data, o.dtype, begin + (c + i) * o.channel_stride) : 0.0F;
}

constexpr int kKeys = 128;  // of a step of few_rows_kernel

// kRows rows against a part of the keys. Four lanes share a key; then pieces of eight channels of the values
// are spread over all threads, which meet at the end. Shared memory: q as f32 (kRows, head_dim rounded up to
// 8), the weights of a step, and sums.
template <int kRows>
__global__ void __launch_bounds__(kThreads)
    few_rows_kernel(Problem p, GpuPlan plan, std::int64_t tasks, Partials partials) {
  extern __shared__ float4 shared_quads[];
  float* const shared = reinterpret_cast<float*>(shared_quads);
  __shared__ float weights[kRows][kKeys];
  __shared__ float factors[kRows];
  __shared__ float states[kRows][2];
  __shared__ float sums[kThreads][8];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int width = static_cast<int>((p.head_dim + 7) / 8) * 8;
  const int pieces = static_cast<int>((p.head_dim_v + 7) / 8);
  const int teams = kThreads / pieces;  // of threads that hold all channels of a key
  const int piece = thread % pieces;
  const int team = thread / pieces;
  const bool whole = plan.splits == 1;
  const float scale = static_cast<float>(p.scale) * kLog2E;
  for (std::int64_t index = blockIdx.x; index < tasks; index += gridDim.x) {
    const Task t = task_of(index, plan, p.heads_kv);
    const std::int64_t all_rows = p.queries * p.group;
    const int rows = static_cast<int>(min(std::int64_t{kRows}, all_rows - t.row));
    __syncthreads();  // nobody reads what the task before left
    for (int i = thread; i < kRows * width; i += kThreads) {
      const int r = i / width;
      const std::int64_t c = i % width;
      const std::int64_t row = t.row + r;
      float value = 0.0F;
      if (r < rows && c < p.head_dim)
        value = cuda::load_float(p.q.data, p.q.dtype,
                                 offset_of_row(p.q, row / p.group, t.head_kv * p.group + row % p.group) +
                                     c * p.q.channel_stride) *
                scale;
      shared[i] = value;
    }
    if (thread < kRows) {
      states[thread][0] = -INFINITY;
      states[thread][1] = 0.0F;
    }
    const auto visible = [&](std::int64_t row) {
      return p.causal ? p.keys - p.queries + row / p.group + 1 : p.keys;
    };
    const std::int64_t end = min((t.split + 1) * plan.keys_of_split, visible(t.row + rows - 1));
    float out[kRows][8] = {};
    __syncthreads();
    for (std::int64_t key = t.split * plan.keys_of_split; key < end; key += kKeys) {
#pragma unroll
      for (int half = 0; half < kKeys * 4 / kThreads; ++half) {
        const int of_step = thread / 4 + half * (kThreads / 4);
        const std::int64_t k = key + of_step;
        float score[kRows] = {};
        if (k < end) {
          const std::int64_t begin = k * p.k.position_stride + t.head_kv * p.k.head_stride;
          for (int c = thread % 4 * 8; c < width; c += 32) {
            float of_key[8];
            load_eight(p.k, plan.packed_keys, begin, c, p.head_dim, of_key);
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
              for (int quad = 0; quad < 2; ++quad) {
                const float4 of_row = shared_quads[(r * width + c) / 4 + quad];
                score[r] = fmaf(of_row.x, of_key[4 * quad], score[r]);
                score[r] = fmaf(of_row.y, of_key[4 * quad + 1], score[r]);
                score[r] = fmaf(of_row.z, of_key[4 * quad + 2], score[r]);
                score[r] = fmaf(of_row.w, of_key[4 * quad + 3], score[r]);
              }
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          score[r] += __shfl_xor_sync(0xffffffffU, score[r], 1);
          score[r] += __shfl_xor_sync(0xffffffffU, score[r], 2);
          if (thread % 4 == 0) weights[r][of_step] = score[r];
        }
      }
      __syncthreads();
      // A warp a row: scores become weights.
      for (int r = warp; r < kRows; r += kThreads / 32) {
        const std::int64_t last = r < rows ? min(end, visible(t.row + r)) : key;
        float score[kKeys / 32];
        float most = states[r][0];
        const float before = most;
#pragma unroll
        for (int i = 0; i < kKeys / 32; ++i) {
          score[i] = weights[r][lane + 32 * i];
          if (key + lane + 32 * i < last) most = fmaxf(most, score[i]);
        }
        for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, step));
        float sum = 0.0F;
#pragma unroll
        for (int i = 0; i < kKeys / 32; ++i) {
          const bool seen = key + lane + 32 * i < last && score[i] != -INFINITY;
          const float weight = seen ? exp2f(score[i] - most) : 0.0F;
          weights[r][lane + 32 * i] = weight;
          sum += weight;
        }
        sum = cuda::warp_sum(sum);
        __syncwarp();  // all have read the state
        if (lane == 0) {
          factors[r] = rescale(before, most);
          states[r][0] = most;
          states[r][1] = states[r][1] * factors[r] + sum;
        }
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int e = 0; e < 8; ++e) out[r][e] *= factors[r];
      if (team < teams)
        for (int of_step = team; of_step < kKeys && key + of_step < end; of_step += teams) {
          float of_key[8];
          load_eight(p.v, plan.packed_values,
                     (key + of_step) * p.v.position_stride + t.head_kv * p.v.head_stride, piece * 8,
                     p.head_dim_v, of_key);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float weight = weights[r][of_step];
#pragma unroll
            for (int e = 0; e < 8; ++e) out[r][e] = fmaf(weight, of_key[e], out[r][e]);
          }
        }
      __syncthreads();
    }
    // The teams meet, a row at a time, in order.
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      __syncthreads();
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[thread][e] = out[r][e];
      __syncthreads();
      if (r >= rows) continue;
      const float largest = states[r][0];
      const float total = states[r][1];
      for (int channel = thread; channel < p.head_dim_v; channel += kThreads) {
        float sum = 0.0F;
        for (int other = 0; other < teams; ++other) sum += sums[other * pieces + channel / 8][channel % 8];
        store_out(p, partials, t, whole, t.row + r, channel, sum, total);
      }
      if (thread == 0) store_state(p, partials, t, whole, t.row + r, largest, total);
    }
  }
}

// Joins the parts of the keys, a warp a row.
__global__ void __launch_bounds__(kThreads) join_kernel(Problem p, GpuPlan plan, Partials partials) {
  const std::int64_t rows = p.queries * p.group;
  const std::int64_t all = p.heads_kv * rows;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int64_t i = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; i < all;
       i += std::int64_t{gridDim.x} * (kThreads / 32)) {
    const Task t{.head_kv = i / rows};
    const auto state = [&](std::int64_t split, int which) {
      return partials.state[(split * all + i) * 2 + which];
    };
    float largest = -INFINITY;
    for (std::int64_t s = 0; s < plan.splits; ++s) largest = fmaxf(largest, state(s, 0));
    float total = 0.0F;
    for (std::int64_t s = 0; s < plan.splits; ++s) total += state(s, 1) * rescale(state(s, 0), largest);
    for (std::int64_t channel = lane; channel < p.head_dim_v; channel += 32) {
      float sum = 0.0F;
      for (std::int64_t s = 0; s < plan.splits; ++s)
        sum += partials.out[(s * all + i) * p.head_dim_v + channel] * rescale(state(s, 0), largest);
      store_out(p, partials, t, true, i % rows, channel, sum, total);
    }
    if (lane == 0) store_state(p, partials, t, true, i % rows, largest, total);
  }
}

}  // namespace

void forward(Context& ctx, const Problem& p) {
  const GpuPlan plan = make_gpu_plan(p);
  Tensor out;
  Tensor state;
  Partials partials{};
  const std::int64_t rows = p.queries * p.group;
  if (plan.splits > 1) {
    out = ctx.empty({plan.splits, p.heads_kv, rows, p.head_dim_v});
    state = ctx.empty({plan.splits, p.heads_kv, rows, 2});
    partials = {out.data<float>(), state.data<float>()};
  }
  const std::int64_t tasks = plan.tasks(p.heads_kv);
  const dim3 grid(cuda::blocks_for(ctx, tasks, 1));
  const auto few_rows = [&](auto* kernel) {
    const auto shared =
        static_cast<std::size_t>(plan.rows_of_block * ((p.head_dim + 7) / 8) * 8) * sizeof(float);
    cuda::launch(ctx, "attention few rows", kernel, grid, dim3(kThreads), shared, p, plan, tasks, partials);
  };
  if (plan.rows_of_block == 1)
    few_rows(&few_rows_kernel<1>);
  else if (plan.rows_of_block == kFewRows)
    few_rows(&few_rows_kernel<kFewRows>);
  else
    cuda::launch(ctx, "attention", &tile_kernel, grid, dim3(kThreads), 0, p, plan, tasks, partials);
  if (plan.splits > 1)
    cuda::launch(ctx, "attention join", &join_kernel,
                 dim3(cuda::blocks_for(ctx, p.heads_kv * rows, kThreads / 32)), dim3(kThreads), 0, p, plan,
                 partials);
}

}  // namespace gpu
}  // namespace krait::attention_kernels
