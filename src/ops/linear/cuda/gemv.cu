// Few rows of x: the time is that of reading the weights, so each is read once, 16 bytes a lane, and widened
// once for all rows of x. While a warp multiplies what it holds, its next loads are on their way.
#include <algorithm>

#include "core/cuda/elements.cuh"
#include "ops/linear/kernels.h"

namespace krait::linear_detail {
namespace {

using gpu::GemvPlan;
using gpu::kGemvRows;
using gpu::kGemvWarps;

constexpr int kThreads = 32 * kGemvWarps;

struct Gemv {
  const void* weight;
  std::int64_t weight_stride;  // in elements
  std::int64_t in;
  std::int64_t out_size;
  int rows;  // of x
  cuda::AnyView<2> x;
  bool x_quads;  // four neighbours of x can be loaded at once
  cuda::AnyView<1> bias;
  cuda::AnyView<2> out;
  bool accumulate;
  int lanes_log2;
  int splits_log2;
  int steps;
  int tile;
  int units;

  __device__ void store(std::int64_t column, int row, float sum) const {
    if (column >= out_size || row >= rows) return;
    if (bias) sum += bias.load(column);
    if (accumulate) sum += out.load(row, column);
    out.store(sum, row, column);
  }
};

// 16 bytes that nobody will ask for again.
__device__ __forceinline__ uint4 load_once(const void* from) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from));
  return v;
#else
  return *static_cast<const uint4*>(from);
#endif
}

// 16 bytes of weights: their number, and four of them as f32.
template <typename T>
struct Piece {
  static constexpr int kCount = 16 / sizeof(T);
  __device__ static float4 quad(const uint4& v, int q) {
    if constexpr (std::is_same_v<T, float>) {
      return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
    } else {
      const unsigned low = q == 0 ? v.x : v.z;
      const unsigned high = q == 0 ? v.y : v.w;
      if constexpr (std::is_same_v<T, __half>) {
        const auto half = [](unsigned bits) {
          return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
        };
        return {half(low & 0xffffU), half(low >> 16), half(high & 0xffffU), half(high >> 16)};
      } else {
        return {__uint_as_float(low << 16), __uint_as_float(low & 0xffff0000U), __uint_as_float(high << 16),
                __uint_as_float(high & 0xffff0000U)};
      }
    }
  }
};

// to[place(r, i)] = quad i (from `first` on, of kRows x quads) of row r of x, zeros beyond its ends. Several
// loads of a thread are on their way at once.
template <int kRows, typename Load, typename Place>
__device__ __forceinline__ void stage(const Gemv& p, float4* to, int first, int quads, const Load& load,
                                      const Place& place) {
  constexpr int kAtOnce = 4;
  for (int begin = static_cast<int>(threadIdx.x); begin < kRows * quads; begin += kAtOnce * kThreads) {
    float4 held[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = begin + n * kThreads;
      const int r = kRows == 1 ? 0 : i / quads;
      const int k = (first + i - r * quads) * 4;
      held[n] = i < kRows * quads && r < p.rows && k < p.in ? load(r, k) : float4{0.0F, 0.0F, 0.0F, 0.0F};
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int i = begin + n * kThreads;
      const int r = kRows == 1 ? 0 : i / quads;
      if (i < kRows * quads) to[r * quads + place(i - r * quads)] = held[n];
    }
  }
}

template <int kRows, typename Place>
__device__ __forceinline__ void stage_x(const Gemv& p, float4* to, int first, int quads, const Place& place) {
  const std::int64_t stride = p.x.stride[0];
  if (p.x_quads && p.x.dtype == DType::f32) {
    const auto* x = static_cast<const float*>(p.x.data);
    stage<kRows>(
        p, to, first, quads,
        [=](int r, int k) { return *reinterpret_cast<const float4*>(x + r * stride + k); }, place);
  } else if (p.x_quads) {
    const auto* x = static_cast<const unsigned short*>(p.x.data);
    const bool bf16 = p.x.dtype == DType::bf16;
    stage<kRows>(
        p, to, first, quads,
        [=](int r, int k) {
          const uint2 v = *reinterpret_cast<const uint2*>(x + r * stride + k);
          const uint4 pair = {v.x, v.y, 0, 0};
          return bf16 ? Piece<__nv_bfloat16>::quad(pair, 0) : Piece<__half>::quad(pair, 0);
        },
        place);
  } else {
    stage<kRows>(
        p, to, first, quads,
        [&](int r, int k) {
          return float4{p.x.load(r, k), p.x.load(r, k + 1), p.x.load(r, k + 2), p.x.load(r, k + 3)};
        },
        place);
  }
}

// Shared memory: x of a tile as f32, kRows of (steps, quads of a piece, lanes, 4), so that the lanes of a
// warp read neighbours; then, twice, the sums of all warps where several share rows.
template <typename Weight, int kRows>
__global__ void __launch_bounds__(kThreads, gpu::gemv_blocks(kRows)) gemv_kernel(Gemv p) {
  constexpr int kCount = Piece<Weight>::kCount;
  constexpr int kQuads = kCount / 4;
  constexpr int kSums = kGemvRows * kRows;
  extern __shared__ float4 shared[];

  const int lanes_log2 = p.lanes_log2;
  const int lanes = 1 << lanes_log2;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int at = lane & (lanes - 1);      // among the lanes of a row
  const int sub_rows = 32 >> lanes_log2;  // rows side by side in a warp
  const int splits = 1 << p.splits_log2;
  const int slice = warp & (splits - 1);
  const int team = warp >> p.splits_log2;
  const int rows_of_unit = kGemvRows * sub_rows;
  const int step_size = lanes * kCount;
  const int in = static_cast<int>(p.in);
  const int quads_of_tile = p.tile * kQuads * lanes;  // of one row of x
  const int unit_step = static_cast<int>(gridDim.x) * (kGemvWarps >> p.splits_log2);
  float* const parts = reinterpret_cast<float*>(shared + kRows * quads_of_tile);

  const Weight* row[kGemvRows];
  uint4 next[kGemvRows];
  // Neighbouring units go to different blocks, so that every multiprocessor has the same number of them.
  int next_unit = static_cast<int>(blockIdx.x + gridDim.x * static_cast<unsigned>(team));
  int next_step = slice;
  const auto find_rows = [&] {
#pragma unroll
    for (int j = 0; j < kGemvRows; ++j) {
      // Rows beyond the last one repeat it; their sums are not stored.
      const std::int64_t r =
          min(std::int64_t{next_unit} * rows_of_unit + (lane >> lanes_log2) + j * sub_rows, p.out_size - 1);
      row[j] = static_cast<const Weight*>(p.weight) + r * p.weight_stride + at * kCount;
    }
  };
  const auto fetch = [&] {
    const int k = next_step * step_size;
    const bool inside = k + at * kCount < in && next_unit < p.units;
#pragma unroll
    for (int j = 0; j < kGemvRows; ++j) next[j] = inside ? load_once(row[j] + k) : uint4{0, 0, 0, 0};
  };
  find_rows();
  fetch();
  bool staged = false;
  int round = 0;
  // All warps of a block take the same rounds, those without a unit with zeros.
  for (int base = static_cast<int>(blockIdx.x); base < p.units; base += unit_step, ++round) {
    const int unit = base + static_cast<int>(gridDim.x) * team;
    float sum[kGemvRows][kRows] = {};
    for (int tile = 0; tile < p.steps; tile += p.tile) {
      if (!staged || p.tile < p.steps) {
        if (staged) __syncthreads();  // everyone is done with the tile before
        stage_x<kRows>(p, shared, tile * kQuads * lanes, quads_of_tile, [=](int i) {
          const int step = i >> lanes_log2 >> (kQuads / 2);
          const int in_step = i & (kQuads * lanes - 1);
          return (step * kQuads + in_step % kQuads) * lanes + in_step / kQuads;
        });
        staged = true;
        __syncthreads();
      }
      const int end = min(tile + p.tile, p.steps);
      for (int step = tile + slice; step < end; step += splits) {
        uint4 held[kGemvRows];
#pragma unroll
        for (int j = 0; j < kGemvRows; ++j) held[j] = next[j];
        next_step += splits;
        if (next_step >= p.steps) {
          next_step = slice;
          next_unit += unit_step;
          find_rows();
        }
        fetch();
        const float4* from = shared + (step - tile) * kQuads * lanes + at;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          float4 w[kGemvRows];
#pragma unroll
          for (int j = 0; j < kGemvRows; ++j) w[j] = Piece<Weight>::quad(held[j], q);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float4 x = from[r * quads_of_tile + q * lanes];
#pragma unroll
            for (int j = 0; j < kGemvRows; ++j) {
              sum[j][r] = fmaf(w[j].x, x.x, sum[j][r]);
              sum[j][r] = fmaf(w[j].y, x.y, sum[j][r]);
              sum[j][r] = fmaf(w[j].z, x.z, sum[j][r]);
              sum[j][r] = fmaf(w[j].w, x.w, sum[j][r]);
            }
          }
        }
      }
    }
    for (int half = lanes / 2; half > 0; half /= 2)
#pragma unroll
      for (int j = 0; j < kGemvRows; ++j)
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[j][r] += __shfl_xor_sync(0xffffffffU, sum[j][r], half);

    const std::int64_t first_row = std::int64_t{unit} * rows_of_unit;
    if (splits == 1) {
#pragma unroll
      for (int j = 0; j < kGemvRows; ++j)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (at == ((j * kRows + r) & (lanes - 1)))
            p.store(first_row + (lane >> lanes_log2) + j * sub_rows, r, sum[j][r]);
      continue;
    }
    // Two buffers in turn: whoever writes this one again has passed the barrier of the other.
    float* const mine = parts + (round % 2) * (kGemvWarps * kSums);
#pragma unroll
    for (int j = 0; j < kGemvRows; ++j)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (lane == (j * kRows + r) % 32) mine[warp * kSums + j * kRows + r] = sum[j][r];
    __syncthreads();
    for (int i = slice * 32 + lane; i < kSums; i += splits * 32) {
      float total = 0.0F;
      for (int s = 0; s < splits; ++s) total += mine[(team * splits + s) * kSums + i];
      p.store(first_row + i / kRows, i % kRows, total);
    }
  }
}

// Any strides, sizes and alignment: a warp a row of weights, element by element.
__global__ void __launch_bounds__(kThreads) gemv_any_kernel(Gemv p, cuda::AnyView<2> weight) {
  constexpr int kRows = 4;  // of x at a time
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t warps = std::int64_t{gridDim.x} * kGemvWarps;
  for (std::int64_t o = std::int64_t{blockIdx.x} * kGemvWarps + threadIdx.x / 32; o < p.out_size; o += warps)
    for (int first = 0; first < p.rows; first += kRows) {
      float sum[kRows] = {};
      for (std::int64_t k = lane; k < p.in; k += 32) {
        const float w = weight.load(o, k);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          if (first + r < p.rows) sum[r] = fmaf(w, p.x.load(first + r, k), sum[r]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float total = cuda::warp_sum(sum[r]);
        if (lane == r) p.store(o, first + r, total);
      }
    }
}

int log2_of(int power) {
  int log2 = 0;
  while (1 << log2 < power) ++log2;
  return log2;
}

bool multiple_of_16_bytes(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

template <typename Weight, int kRows>
void launch_rows(Context& ctx, Gemv p) {
  constexpr int kCount = Piece<Weight>::kCount;
  const int multiprocessors = cuda::limits_of(ctx).multiprocessors;
  const GemvPlan plan = gpu::choose_gemv_plan(kRows, p.in, p.out_size, kCount == 4 ? DType::f32 : DType::bf16,
                                              multiprocessors, cuda::limits_of(ctx).shared_memory_per_block);
  p.lanes_log2 = log2_of(plan.lanes);
  p.splits_log2 = log2_of(plan.splits);
  p.steps = static_cast<int>(plan.steps);
  p.tile = static_cast<int>(plan.tile);
  p.units = static_cast<int>(plan.units);
  const std::int64_t x_bytes = std::int64_t{kRows} * plan.tile * plan.lanes * 16 * (kCount / 4);
  const std::size_t shared =
      static_cast<std::size_t>(x_bytes) +
      (plan.splits > 1 ? static_cast<std::size_t>(gpu::gemv_exchange_bytes(kRows)) : 0);
  const std::int64_t blocks = std::min(plan.units, std::int64_t{multiprocessors} * gpu::gemv_blocks(kRows));
  cuda::launch(ctx, "linear gemv", &gemv_kernel<Weight, kRows>, dim3(static_cast<unsigned>(blocks)),
               dim3(kThreads), shared, p);
}

template <typename Weight>
void launch_weight(Context& ctx, const Gemv& p) {
  if (p.rows <= 1) return launch_rows<Weight, 1>(ctx, p);
  if (p.rows <= 2) return launch_rows<Weight, 2>(ctx, p);
  if (p.rows <= 4) return launch_rows<Weight, 4>(ctx, p);
  if (p.rows <= 8) return launch_rows<Weight, 8>(ctx, p);
  launch_rows<Weight, 16>(ctx, p);
}

}  // namespace

void gpu::gemv(Context& ctx, const Problem& problem) {
  const Tensor& weight = problem.weight;
  const auto element = static_cast<std::int64_t>(size_of(weight.dtype()));
  constexpr std::int64_t kMostSize = std::int64_t{1} << 30;  // counted in 32 bits
  const bool packed = weight.size(1) > 0 && weight.size(1) * element % 16 == 0 && weight.stride(1) == 1 &&
                      multiple_of_16_bytes(weight.raw()) &&
                      (weight.size(0) == 1 || weight.stride(0) * element % 16 == 0) &&
                      weight.size(0) < kMostSize && weight.size(1) < kMostSize;
  const Tensor& x = problem.x;
  const std::int64_t x_quad = 4 * static_cast<std::int64_t>(size_of(x.dtype()));
  const bool x_quads = x.stride(1) == 1 && multiple_of_16_bytes(x.raw()) &&
                       x.stride(0) * static_cast<std::int64_t>(size_of(x.dtype())) % x_quad == 0;
  constexpr std::int64_t kMostRows = 16;
  for (std::int64_t begin = 0; begin < x.size(0); begin += kMostRows) {
    const std::int64_t end = std::min(x.size(0), begin + kMostRows);
    Gemv p{.weight = weight.raw(),
           .weight_stride = weight.stride(0),
           .in = weight.size(1),
           .out_size = weight.size(0),
           .rows = static_cast<int>(end - begin),
           .x = cuda::AnyView<2>(x.slice(0, begin, end)),
           .x_quads = x_quads,
           .bias = cuda::AnyView<1>(problem.bias),
           .out = cuda::AnyView<2>(problem.out.slice(0, begin, end)),
           .accumulate = problem.accumulate};
    if (packed)
      cuda::dispatch_element(weight.dtype(), "[linear] weight",
                             [&](auto tag) { launch_weight<decltype(tag)>(ctx, p); });
    else
      cuda::launch(ctx, "linear gemv any", &gemv_any_kernel,
                   dim3(cuda::blocks_for(ctx, p.out_size, kGemvWarps)), dim3(kThreads), 0, p,
                   cuda::AnyView<2>(weight));
  }
}

}  // namespace krait::linear_detail
