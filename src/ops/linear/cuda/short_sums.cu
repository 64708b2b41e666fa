// Products with few terms to a sum that are added to 16-bit results, which take the time that x and out take
// to arrive and leave: each is read and written once. A block has a tile of out; x, weight and out itself are
// on their way to shared memory together, and the result leaves from there in whole vectors, rounded once.
#include "core/cuda/async_copy.cuh"
#include "core/cuda/elements.cuh"
#include "core/cuda/tensor_cores.cuh"
#include "ops/linear/kernels.h"

namespace krait::linear_detail {
namespace {

constexpr int kVector = 8;  // elements of 16 bytes
constexpr int kStep = 16;   // terms of a product of tensor cores
constexpr int kRows = 64;   // of out, for four warps of 32 x 64 each
constexpr int kColumns = 128;
constexpr int kThreads = 128;
constexpr int kLongest = 192;  // terms: more blocks side by side are worth more than longer sums

struct Product {
  const void* x = nullptr;
  const void* weight = nullptr;
  void* out = nullptr;
  std::int64_t x_stride = 0;
  std::int64_t weight_stride = 0;
  std::int64_t out_stride = 0;
  std::int64_t rows = 0;
  int in = 0;
  int columns = 0;
  int tiles_across = 0;
};

// Rows in shared memory have an odd number of vectors: eight that follow one another begin in different
// banks.
constexpr int pitch_of(int elements) { return (elements / kVector | 1) * kVector; }
constexpr int padded(int in) { return (in + kStep - 1) / kStep * kStep; }
constexpr int kOutPitch = pitch_of(kColumns);

constexpr int weight_elements(int in, bool by_columns) {
  return by_columns ? padded(in) * kOutPitch : kColumns * pitch_of(padded(in));
}
constexpr std::size_t shared_bytes(int in, bool by_columns) {
  return sizeof(__half) * static_cast<std::size_t>(kRows * pitch_of(padded(in)) +
                                                   weight_elements(in, by_columns) + kRows * kOutPitch);
}

template <bool kTransposed>
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
  cuda::load_matrices<kTransposed>(to, static_cast<unsigned>(__cvta_generic_to_shared(row)));
}

// A tile in shared memory: rows [0, rows) of `vectors` vectors each, of which those inside are copied and the
// others are 0.
template <typename T, typename Inside>
__device__ __forceinline__ void copy_tile(T* to, int pitch, int rows, int vectors, const T* from,
                                          std::int64_t stride, const Inside& inside) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * vectors; i += kThreads) {
    const int row = i / vectors;
    const int vector = i % vectors;
    T* const place = to + row * pitch + vector * kVector;
    if (inside(row, vector))
      cuda::copy_async(place, from + row * stride + vector * kVector);
    else
      *reinterpret_cast<uint4*>(place) = uint4{0, 0, 0, 0};
  }
}

// kByColumns: the weight lies as (in, out), else as (out, in).
template <typename T, bool kByColumns>
__global__ void __launch_bounds__(kThreads) add_short_sums_kernel(const Product p) {
  extern __shared__ uint4 shared[];
  const int depth = padded(p.in);
  const int x_pitch = pitch_of(depth);
  const int weight_pitch = kByColumns ? kOutPitch : x_pitch;
  T* const x = reinterpret_cast<T*>(shared);
  T* const weight = x + kRows * x_pitch;
  T* const out = weight + weight_elements(p.in, kByColumns);

  const int column0 = static_cast<int>(blockIdx.x % p.tiles_across) * kColumns;
  const std::int64_t row0 = std::int64_t{blockIdx.x / p.tiles_across} * kRows;
  const int rows = p.rows - row0 < kRows ? static_cast<int>(p.rows - row0) : kRows;
  const int columns = p.columns - column0 < kColumns ? p.columns - column0 : kColumns;
  T* const to = static_cast<T*>(p.out) + row0 * p.out_stride + column0;

  copy_tile(x, x_pitch, kRows, depth / kVector, static_cast<const T*>(p.x) + row0 * p.x_stride, p.x_stride,
            [&](int row, int vector) { return row < rows && vector * kVector < p.in; });
  if constexpr (kByColumns)
    copy_tile(weight, weight_pitch, depth, kColumns / kVector, static_cast<const T*>(p.weight) + column0,
              p.weight_stride, [&](int k, int vector) { return k < p.in && vector * kVector < columns; });
  else
    copy_tile(weight, weight_pitch, kColumns, depth / kVector,
              static_cast<const T*>(p.weight) + column0 * p.weight_stride, p.weight_stride,
              [&](int column, int vector) { return column < columns && vector * kVector < p.in; });
  cuda::commit_copies();
  copy_tile(out, kOutPitch, kRows, kColumns / kVector, static_cast<const T*>(to), p.out_stride,
            [&](int row, int vector) { return row < rows && vector * kVector < columns; });
  cuda::commit_copies();
  cuda::wait_for_copies<1>();
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp / 2 * 32;
  const int warp_column = warp % 2 * 64;
  float sum[2][8][4] = {};
  for (int k = 0; k < depth; k += kStep) {
    unsigned a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
      load_matrices<false>(a[m], x + (warp_row + m * 16 + lane % 16) * x_pitch + k + lane / 16 * kVector);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      unsigned b[4];
      const int column = warp_column + n * 16;
      if constexpr (kByColumns)
        load_matrices<true>(b, weight + (k + lane % 16) * weight_pitch + column + lane / 16 * kVector);
      else
        load_matrices<false>(
            b, weight + (column + lane / 16 * 8 + lane % 8) * weight_pitch + k + lane / 8 % 2 * kVector);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        cuda::multiply_add<T>(sum[m][2 * n], a[m], b[0], b[1]);
        cuda::multiply_add<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }

  cuda::wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        T* const pair = out + row * kOutPitch + warp_column + n * 8 + lane % 4 * 2;
        alignas(sizeof(unsigned)) T both[2];
        *reinterpret_cast<unsigned*>(both) = *reinterpret_cast<const unsigned*>(pair);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          both[i] = cuda::from_float<T>(cuda::to_float(both[i]) + sum[m][n][half * 2 + i]);
        *reinterpret_cast<unsigned*>(pair) = *reinterpret_cast<const unsigned*>(both);
      }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns / kVector; i += kThreads) {
    const int row = i / (kColumns / kVector);
    const int column = i % (kColumns / kVector) * kVector;
    if (row < rows && column < columns)
      *reinterpret_cast<uint4*>(to + row * p.out_stride + column) =
          *reinterpret_cast<const uint4*>(out + row * kOutPitch + column);
  }
}

bool in_vectors(const Tensor& t, int along) {
  const std::int64_t stride = t.stride(1 - along);
  return (t.stride(along) == 1 || t.size(along) == 1) && t.size(along) % kVector == 0 &&
         (stride % kVector == 0 || t.size(1 - along) == 1) &&
         reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0;
}

}  // namespace

bool gpu::add_short_sums(Context& ctx, const Problem& problem) {
#ifdef __HIP_PLATFORM_AMD__
  return false;
#endif
  const Tensor& weight = problem.weight;
  const DType dtype = weight.dtype();
  const std::int64_t columns = weight.size(0);
  const bool by_columns = weight.stride(1) != 1;
  if (cuda::limits_of(ctx).compute_capability < 80 || (dtype != DType::bf16 && dtype != DType::f16) ||
      problem.x.dtype() != dtype || problem.out.dtype() != dtype || problem.bias)
    return false;
  if (weight.size(1) == 0 || weight.size(1) > kLongest || columns >= std::int64_t{1} << 30) return false;
  if (!in_vectors(problem.x, 1) || !in_vectors(problem.out, 1) || !in_vectors(weight, by_columns ? 0 : 1))
    return false;
  const std::int64_t across = (columns + kColumns - 1) / kColumns;
  const std::int64_t tiles = across * ((problem.x.size(0) + kRows - 1) / kRows);
  const auto in = static_cast<int>(weight.size(1));
  const std::size_t shared = shared_bytes(in, by_columns);
  if (tiles >= std::int64_t{1} << 31 ||
      shared > static_cast<std::size_t>(cuda::limits_of(ctx).shared_memory_per_block))
    return false;

  const Product p{.x = problem.x.raw(),
                  .weight = weight.raw(),
                  .out = problem.out.raw(),
                  .x_stride = problem.x.stride(0),
                  .weight_stride = weight.stride(by_columns ? 1 : 0),
                  .out_stride = problem.out.stride(0),
                  .rows = problem.x.size(0),
                  .in = in,
                  .columns = static_cast<int>(columns),
                  .tiles_across = static_cast<int>(across)};
  const auto launch = [&](auto* kernel) {
    cuda::launch(ctx, "linear add short sums", kernel, dim3(static_cast<unsigned>(tiles)), dim3(kThreads),
                 shared, p);
  };
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    by_columns ? launch(add_short_sums_kernel<T, true>) : launch(add_short_sums_kernel<T, false>);
  };
  dtype == DType::f16 ? run(__half{}) : run(__nv_bfloat16{});
  return true;
}

}  // namespace krait::linear_detail
