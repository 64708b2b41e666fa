// The backward on a GPU, in tiles of 64 x 64 whose weights are computed again: one kernel for dk and dv, a
// block a tile of keys, which walks along the rows that see them; one for dq, a block a tile of rows. So
// every sum belongs to one thread, in a fixed order. Widths beyond 64 channels are divided among blocks.
#include <algorithm>

#include "core/cuda/elements.cuh"
#include "ops/attention/cuda/tile.cuh"

namespace krait::attention_kernels {
namespace gpu {
namespace {

constexpr int kThreads = kTileThreads;

// For each row of each head of keys: dout . out, and the logsumexp as a power of two.
struct RowTerms {
  float* at;  // (Hkv, rows, 2)
};

__global__ void __launch_bounds__(kThreads) row_terms_kernel(Problem p, Operand dout, RowTerms terms) {
  const std::int64_t rows = p.queries * p.group;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int64_t i = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; i < p.heads_kv * rows;
       i += std::int64_t{gridDim.x} * (kThreads / 32)) {
    const std::int64_t query = i % rows / p.group;
    const std::int64_t head = i / rows * p.group + i % rows % p.group;
    const std::int64_t out_begin = offset_of_row(p.out, query, head);
    const std::int64_t dout_begin = offset_of_row(dout, query, head);
    float sum = 0.0F;
    for (std::int64_t c = lane; c < p.head_dim_v; c += 32)
      sum = fmaf(cuda::load_float(p.out.data, p.out.dtype, out_begin + c * p.out.channel_stride),
                 cuda::load_float(dout.data, dout.dtype, dout_begin + c * dout.channel_stride), sum);
    sum = cuda::warp_sum(sum);
    if (lane != 0) continue;
    terms.at[2 * i] = sum;
    terms.at[2 * i + 1] =
        cuda::load_float(p.logsumexp.data, p.logsumexp.dtype, offset_of_row(p.logsumexp, query, head)) *
        kLog2E;
  }
}

struct Shared {
  Stage a_stage;
  Stage b_stage;
  Weights weights;
  Rows rows;
};

// The weights of rows `row` .. with keys `key` .., and the gradients of their scaled scores.
__device__ __forceinline__ void weights_of_tile(const Problem& p, const Operand& dout, const RowTerms& terms,
                                                std::int64_t head_kv, std::int64_t row, std::int64_t key,
                                                Shared& shared, float (&weight)[4][4],
                                                float (&dproduct)[4][4]) {
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const std::int64_t rows = p.queries * p.group;
  multiply_rows_by_keys(p.q, shared.rows.q, p.k, head_kv, key, p.keys, p.head_dim, shared.a_stage,
                        shared.b_stage, weight);
  multiply_rows_by_keys(dout, shared.rows.dout, p.v, head_kv, key, p.keys, p.head_dim_v, shared.a_stage,
                        shared.b_stage, dproduct);
  const float scale = static_cast<float>(p.scale);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int line = ty + 16 * i;
    const std::int64_t visible = shared.rows.visible[line];
    const float* term = terms.at + 2 * (head_kv * rows + min(row + line, rows - 1));
    const float mean_dweight = term[0];
    const float logsumexp = term[1];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool seen = key + tx + 16 * j < visible;
      weight[i][j] = seen ? exp2f(weight[i][j] * (scale * kLog2E) - logsumexp) : 0.0F;
      dproduct[i][j] = seen ? scale * weight[i][j] * (dproduct[i][j] - mean_dweight) : 0.0F;
    }
  }
}

__device__ __forceinline__ void put(Weights& to, const float (&tile)[4][4]) {
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const int ty = static_cast<int>(threadIdx.x) / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) to.at[ty + 16 * i][tx + 16 * j] = tile[i][j];
}

__device__ __forceinline__ void store_keys(const Operand& to, const Problem& p, std::int64_t head_kv,
                                           std::int64_t key, std::int64_t channel, std::int64_t width,
                                           const float (&sum)[4][4]) {
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const int ty = static_cast<int>(threadIdx.x) / 16;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t k = key + ty + 16 * i;
      const std::int64_t c = channel + tx + 16 * j;
      if (k < p.keys && c < width)
        cuda::store_float(to.data, to.dtype,
                          k * to.position_stride + head_kv * to.head_stride + c * to.channel_stride,
                          sum[i][j]);
    }
}

__global__ void __launch_bounds__(kThreads)
    keys_kernel(Problem p, Gradients g, RowTerms terms, std::int64_t key_blocks,
                std::int64_t channel_blocks) {
  __shared__ Shared shared;
  const std::int64_t rows = p.queries * p.group;
  const std::int64_t tasks = key_blocks * channel_blocks * p.heads_kv;
  for (std::int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const std::int64_t key = task % key_blocks * kTile;
    const std::int64_t channel = task / key_blocks % channel_blocks * kTile;
    const std::int64_t head_kv = task / key_blocks / channel_blocks;
    const bool wants_dk = g.dk.data != nullptr && channel < p.head_dim;
    const bool wants_dv = g.dv.data != nullptr && channel < p.head_dim_v;
    if (!wants_dk && !wants_dv) continue;
    float dk[4][4] = {};
    float dv[4][4] = {};
    // The first row that sees the first key, at a border of a tile.
    const std::int64_t first_query = p.causal ? max(std::int64_t{0}, key - (p.keys - p.queries)) : 0;
    for (std::int64_t row = first_query * p.group / kTile * kTile; row < rows; row += kTile) {
      __syncthreads();
      place_rows(p, g.dout, head_kv, row, shared.rows);
      __syncthreads();
      float weight[4][4];
      float dproduct[4][4];
      weights_of_tile(p, g.dout, terms, head_kv, row, key, shared, weight, dproduct);
      if (wants_dv) {
        put(shared.weights, weight);
        add_weighted_rows(shared.weights, g.dout, shared.rows.dout, channel, p.head_dim_v, shared.a_stage,
                          dv);
      }
      if (wants_dk) {
        put(shared.weights, dproduct);
        add_weighted_rows(shared.weights, p.q, shared.rows.q, channel, p.head_dim, shared.a_stage, dk);
      }
    }
    if (wants_dk) store_keys(g.dk, p, head_kv, key, channel, p.head_dim, dk);
    if (wants_dv) store_keys(g.dv, p, head_kv, key, channel, p.head_dim_v, dv);
  }
}

__global__ void __launch_bounds__(kThreads)
    queries_kernel(Problem p, Gradients g, RowTerms terms, std::int64_t row_blocks,
                   std::int64_t channel_blocks) {
  __shared__ Shared shared;
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const std::int64_t rows = p.queries * p.group;
  const std::int64_t tasks = row_blocks * channel_blocks * p.heads_kv;
  for (std::int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const std::int64_t row = task % row_blocks * kTile;
    const std::int64_t channel = task / row_blocks % channel_blocks * kTile;
    const std::int64_t head_kv = task / row_blocks / channel_blocks;
    __syncthreads();
    place_rows(p, g.dout, head_kv, row, shared.rows);
    __syncthreads();
    float dq[4][4] = {};
    const std::int64_t end = shared.rows.visible[min(row + kTile, rows) - 1 - row];
    for (std::int64_t key = 0; key < end; key += kTile) {
      float weight[4][4];
      float dproduct[4][4];
      weights_of_tile(p, g.dout, terms, head_kv, row, key, shared, weight, dproduct);
      put(shared.weights, dproduct);
      add_weighted_keys(shared.weights, p.k, head_kv, key, p.keys, channel, p.head_dim, shared.a_stage, dq);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::int64_t r = row + ty + 16 * i;
        const std::int64_t c = channel + tx + 16 * j;
        if (r < rows && c < p.head_dim)
          cuda::store_float(
              g.dq.data, g.dq.dtype,
              offset_of_row(g.dq, r / p.group, head_kv * p.group + r % p.group) + c * g.dq.channel_stride,
              dq[i][j]);
      }
  }
}

std::int64_t tiles(std::int64_t count) { return (count + kTile - 1) / kTile; }

}  // namespace

void backward(Context& ctx, const Problem& p, const Gradients& g) {
  const std::int64_t rows = p.queries * p.group;
  const Tensor terms = ctx.empty({p.heads_kv, rows, 2});
  const RowTerms row_terms{terms.data<float>()};
  if (rows * p.heads_kv > 0)
    cuda::launch(ctx, "attention_backward rows", &row_terms_kernel,
                 dim3(cuda::blocks_for(ctx, p.heads_kv * rows, kThreads / 32)), dim3(kThreads), 0, p, g.dout,
                 row_terms);
  const std::int64_t key_channels =
      std::max(g.dk.data != nullptr ? tiles(p.head_dim) : 0, g.dv.data != nullptr ? tiles(p.head_dim_v) : 0);
  if (const std::int64_t tasks = tiles(p.keys) * key_channels * p.heads_kv; tasks > 0)
    cuda::launch(ctx, "attention_backward keys", &keys_kernel, dim3(cuda::blocks_for(ctx, tasks, 1)),
                 dim3(kThreads), 0, p, g, row_terms, tiles(p.keys), key_channels);
  if (const std::int64_t tasks = tiles(rows) * tiles(p.head_dim) * p.heads_kv;
      g.dq.data != nullptr && tasks > 0)
    cuda::launch(ctx, "attention_backward queries", &queries_kernel, dim3(cuda::blocks_for(ctx, tasks, 1)),
                 dim3(kThreads), 0, p, g, row_terms, tiles(rows), tiles(p.head_dim));
}

}  // namespace gpu
}  // namespace krait::attention_kernels
