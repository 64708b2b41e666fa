// One kernel for every product, and the sums of columns.
#include <algorithm>

#include "core/cuda/elements.cuh"
#include "ops/linear/kernels.h"

namespace krait::linear_detail {
namespace {

constexpr int kTile = 64;   // of rows and of columns of out, for a block of 16 x 16 threads with 4 x 4 each
constexpr int kDepth = 16;  // of `in` at a time
constexpr int kSum = 256;   // terms that are added up before their sum joins the others
constexpr int kThreads = 256;

struct Product {
  cuda::AnyView<2> x;
  cuda::AnyView<2> weight;
  cuda::AnyView<1> bias;
  cuda::AnyView<2> out;
  std::int64_t rows;
  std::int64_t in;
  std::int64_t columns;
  bool accumulate;
};

__global__ void __launch_bounds__(kThreads) plain_kernel(Product p) {
  __shared__ float x_tile[kDepth][kTile + 1];
  __shared__ float weight_tile[kDepth][kTile + 1];
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const std::int64_t tiles_across = (p.columns + kTile - 1) / kTile;
  const std::int64_t tiles = tiles_across * ((p.rows + kTile - 1) / kTile);
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const std::int64_t row = tile / tiles_across * kTile;
    const std::int64_t column = tile % tiles_across * kTile;
    float sum[4][4] = {};
    float part[4][4] = {};
    for (std::int64_t k = 0; k < p.in; k += kDepth) {
      for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
        const int line = i / kDepth;
        const int depth = i % kDepth;
        const bool inside = k + depth < p.in;
        x_tile[depth][line] = inside && row + line < p.rows ? p.x.load(row + line, k + depth) : 0.0F;
        weight_tile[depth][line] =
            inside && column + line < p.columns ? p.weight.load(column + line, k + depth) : 0.0F;
      }
      __syncthreads();
#pragma unroll
      for (int depth = 0; depth < kDepth; ++depth)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            part[i][j] = fmaf(x_tile[depth][ty + 16 * i], weight_tile[depth][tx + 16 * j], part[i][j]);
      __syncthreads();
      if ((k + kDepth) % kSum != 0 && k + kDepth < p.in) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[i][j] += part[i][j];
          part[i][j] = 0.0F;
        }
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const std::int64_t r = row + ty + 16 * i;
        const std::int64_t c = column + tx + 16 * j;
        if (r >= p.rows || c >= p.columns) continue;
        float value = sum[i][j];
        if (p.bias) value += p.bias.load(c);
        if (p.accumulate) value += p.out.load(r, c);
        p.out.store(value, r, c);
      }
  }
}

// Sums of columns in two steps: of `chunk` rows each into partials (chunks, columns), then of these.
constexpr int kColumns = 32;  // of a block, with eight threads for each

__global__ void __launch_bounds__(kThreads)
    chunk_sums_kernel(cuda::AnyView<2> dout, std::int64_t rows, std::int64_t columns, std::int64_t chunk,
                      std::int64_t chunks, float* partials) {
  __shared__ float sums[kThreads / kColumns][kColumns];
  const int tx = static_cast<int>(threadIdx.x) % kColumns;
  const int ty = static_cast<int>(threadIdx.x) / kColumns;
  const std::int64_t across = (columns + kColumns - 1) / kColumns;
  for (std::int64_t task = blockIdx.x; task < across * chunks; task += gridDim.x) {
    const std::int64_t column = task % across * kColumns + tx;
    const std::int64_t begin = task / across * chunk;
    const std::int64_t end = min(begin + chunk, rows);
    float sum = 0.0F;
    if (column < columns)
      for (std::int64_t r = begin + ty; r < end; r += kThreads / kColumns) sum += dout.load(r, column);
    __syncthreads();  // the sums of the task before are read
    sums[ty][tx] = sum;
    __syncthreads();
    if (ty != 0 || column >= columns) continue;
    for (int i = 1; i < kThreads / kColumns; ++i) sum += sums[i][tx];
    partials[task / across * columns + column] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    add_chunks_kernel(const float* partials, std::int64_t chunks, std::int64_t columns, cuda::AnyView<1> to) {
  for (std::int64_t c = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; c < columns;
       c += std::int64_t{gridDim.x} * kThreads) {
    float sum = 0.0F;
    for (std::int64_t i = 0; i < chunks; ++i) sum += partials[i * columns + c];
    to.store(to.load(c) + sum, c);
  }
}

}  // namespace

void gpu::plain(Context& ctx, const Problem& problem) {
  const Product p{.x = cuda::AnyView<2>(problem.x),
                  .weight = cuda::AnyView<2>(problem.weight),
                  .bias = cuda::AnyView<1>(problem.bias),
                  .out = cuda::AnyView<2>(problem.out),
                  .rows = problem.x.size(0),
                  .in = problem.weight.size(1),
                  .columns = problem.weight.size(0),
                  .accumulate = problem.accumulate};
  const auto tiles = [](std::int64_t n) { return (n + kTile - 1) / kTile; };
  const unsigned blocks = cuda::blocks_for(ctx, tiles(p.rows) * tiles(p.columns), 1);
  cuda::launch(ctx, "linear plain", &plain_kernel, dim3(blocks), dim3(kThreads), 0, p);
}

void gpu::column_sums(Context& ctx, const Tensor& dout, const Tensor& bias) {
  const std::int64_t rows = dout.size(0);
  const std::int64_t columns = dout.size(1);
  if (rows == 0 || columns == 0) return;
  // Enough chunks to fill a machine, each worth a line of partial sums. By the shape alone.
  const std::int64_t chunk = std::max<std::int64_t>(64, (rows + 63) / 64);
  const std::int64_t chunks = (rows + chunk - 1) / chunk;
  const Tensor partials = ctx.empty({chunks, columns});
  const std::int64_t tasks = (columns + kColumns - 1) / kColumns * chunks;
  cuda::launch(ctx, "column sums", &chunk_sums_kernel, dim3(cuda::blocks_for(ctx, tasks, 1)), dim3(kThreads),
               0, cuda::AnyView<2>(dout), rows, columns, chunk, chunks, partials.data<float>());
  cuda::launch(ctx, "column sums", &add_chunks_kernel, dim3(cuda::blocks_for(ctx, columns, kThreads)),
               dim3(kThreads), 0, partials.data<float>(), chunks, columns, cuda::AnyView<1>(bias));
}

}  // namespace krait::linear_detail
