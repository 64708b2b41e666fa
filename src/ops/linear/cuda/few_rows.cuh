// Products of up to 16 rows of x with 16-bit weights, which take the time that the weights take to arrive.
// They stream through shared memory, every thread copying what it uses itself, and begin to do so before the
// kernel in front has ended. A tensor core multiplies 8 rows of weights at a time with all rows of x: along
// `in` a thread's 8 neighbours stand for places 2t, 2t+1, 2t+8, 2t+9 of two products, of weights and x alike.
// What x is made of (Input) and what becomes of the sums (Output) is the caller's.
#pragma once

#include "core/cuda/async_copy.cuh"
#include "core/cuda/elements.cuh"
#include "core/cuda/overlap.cuh"
#include "core/cuda/tensor_cores.cuh"
#include "ops/linear/few_rows.h"

namespace krait::linear_detail {

struct FewRowsWeights {
  const void* data = nullptr;
  std::int64_t stride = 0;  // in elements
  int in = 0;
  int out = 0;
  int rows = 0;  // of x
  int steps = 0;
  int x_stride = 0;

  __device__ int padded_in() const { return kFewRowsWarps * steps * kFewRowsStep; }
};

// 16 bytes to shared memory that nobody will ask for again; zeros where `inside` is false.
__device__ __forceinline__ void copy_once(void* shared, const void* global, bool inside,
                                          std::uint64_t policy) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(to), "l"(global),
               "r"(inside ? 16 : 0), "l"(policy)
               : "memory");
#endif
}

// c (16 x 8) += x (16 x 16) weights^T (8 x 16).
template <typename T>
__device__ __forceinline__ void multiply_step(float (&c)[4], unsigned x0, unsigned x1, unsigned x2,
                                              unsigned x3, unsigned w0, unsigned w1) {
  const unsigned x[4] = {x0, x1, x2, x3};
  cuda::multiply_add<T>(c, x, w0, w1);
}

// Input:  Early early(weights)         what can be read before the kernel in front has ended
//         stage(weights, early, x)     writes the rows of x, zeros beyond `in`; all threads; ends in a
//         barrier
// Output: Early early(b, column), Late late(early, b, column)   what a thread needs beside its sum
//         store(early, late, b, column, sum)
template <typename T, int kTiles, bool kWide, typename Input, typename Output>
__global__ void __launch_bounds__(kFewRowsThreads) few_rows(FewRowsWeights p, Input input, Output output) {
  constexpr int kSlots = kWide ? 8 : 16;
  constexpr int kDepth = kSlots / kTiles;  // steps on their way
  constexpr int kColumns = kTiles * 8;
  static_assert(kDepth >= 2);
  extern __shared__ uint4 shared[];
  uint4* const ring = shared + threadIdx.x;
  T* const x = reinterpret_cast<T*>(shared + kSlots * kFewRowsThreads);
  float* const parts = reinterpret_cast<float*>(x + p.rows * p.x_stride);

  cuda::let_next_start();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const auto first = static_cast<int>(std::int64_t{p.out} * blockIdx.x / gridDim.x);
  const int count = static_cast<int>(std::int64_t{p.out} * (blockIdx.x + 1) / gridDim.x) - first;
  const int groups = (count + kColumns - 1) / kColumns;
  const int mine = warp * p.steps * kFewRowsStep + t * 8;  // of `in`

  const std::uint64_t policy = cuda::evict_first();
  int next_step = 0;
  int next_row = g;
  const T* const from = static_cast<const T*>(p.data) + static_cast<std::int64_t>(first) * p.stride;
  const auto fetch = [&](int slot) {
    if (next_row - g < count) {
      const int k = mine + next_step * kFewRowsStep;
      const bool inside = k < p.in;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int row = next_row + 8 * j;
        if (row < count)
          copy_once(ring + (slot * kTiles + j) * kFewRowsThreads, from + row * p.stride + (inside ? k : 0),
                    inside, policy);
      }
      if (++next_step == p.steps) {
        next_step = 0;
        next_row += kColumns;
      }
    }
    cuda::commit_copies();
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) fetch(d);

  const typename Input::Early early_input = input.early(p);
  const int b = static_cast<int>(threadIdx.x) / kColumns;
  const int column_of_group = static_cast<int>(threadIdx.x) % kColumns;
  const bool finishes = b < p.rows;
  const auto holds = [&](int group) { return finishes && group * kColumns + column_of_group < count; };
  typename Output::Early early{};
  if (holds(0)) early = output.early(b, first + column_of_group);
  cuda::wait_for_previous();
  typename Output::Late late{};
  if (holds(0)) late = output.late(early, b, first + column_of_group);
  input.stage(p, early_input, x);

  uint4 weights[kTiles];
  uint4 low{};
  uint4 high{};
  int slot = 0;
  int step = 0;  // of what `load` takes next
  const T* const x_low = x + g * p.x_stride + mine;
  const T* const x_high = x_low + 8 * p.x_stride;
  const auto load = [&] {
    cuda::wait_for_copies<kDepth - 1>();
#pragma unroll
    for (int j = 0; j < kTiles; ++j) weights[j] = ring[(slot * kTiles + j) * kFewRowsThreads];
    if (g < p.rows) low = *reinterpret_cast<const uint4*>(x_low + step * kFewRowsStep);
    if (kWide && g + 8 < p.rows) high = *reinterpret_cast<const uint4*>(x_high + step * kFewRowsStep);
    step = step + 1 == p.steps ? 0 : step + 1;
  };
  load();
  for (int group = 0; group < groups; ++group) {
    float sum[kTiles][4] = {};
    for (int s = 0; s < p.steps; ++s) {
      uint4 w[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) w[j] = weights[j];
      const uint4 a = low;
      const uint4 c = high;
      fetch(slot);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
      load();
#pragma unroll
      for (int j = 0; j < kTiles; ++j) multiply_step<T>(sum[j], a.x, c.x, a.y, c.y, w[j].x, w[j].y);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) multiply_step<T>(sum[j], a.z, c.z, a.w, c.w, w[j].z, w[j].w);
    }
    // Two buffers in turn: whoever writes this one again has passed the barrier of the other.
    float* const own = parts + (group % 2) * kFewRowsWarps * p.rows * kColumns;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (g < p.rows)
        *reinterpret_cast<float2*>(own + (warp * p.rows + g) * kColumns + j * 8 + 2 * t) = {sum[j][0],
                                                                                            sum[j][1]};
      if (kWide && g + 8 < p.rows)
        *reinterpret_cast<float2*>(own + (warp * p.rows + g + 8) * kColumns + j * 8 + 2 * t) = {sum[j][2],
                                                                                                sum[j][3]};
    }
    __syncthreads();
    if (holds(group)) {
      float total = 0.0F;
#pragma unroll
      for (int w = 0; w < kFewRowsWarps; ++w) total += own[(w * p.rows + b) * kColumns + column_of_group];
      const int column = first + group * kColumns + column_of_group;
      output.store(early, late, b, column, total);
      if (holds(group + 1)) {
        early = output.early(b, column + kColumns);
        late = output.late(early, b, column + kColumns);
      }
    }
  }
}

// out (rows, columns) = sum + bias, or added to it.
struct PlainOutput {
  cuda::AnyView<1> bias;
  cuda::AnyView<2> out;
  bool accumulate = false;

  using Early = float;
  struct Late {};
  __device__ float early(int /*b*/, int column) const { return bias ? bias.load(column) : 0.0F; }
  __device__ Late late(float /*early*/, int /*b*/, int /*column*/) const { return {}; }
  __device__ void store(float bias_value, Late /*late*/, int b, int column, float sum) const {
    sum += bias_value;
    if (accumulate) sum += out.load(b, column);
    out.store(sum, b, column);
  }
};

// Rows of the weights' dtype as they are; 16 bytes of them aligned to that.
template <typename T>
struct PlainInput {
  const T* data = nullptr;
  std::int64_t stride = 0;

  struct Early {};
  __device__ Early early(const FewRowsWeights& /*p*/) const { return {}; }
  __device__ void stage(const FewRowsWeights& p, Early /*early*/, T* x) const {
    const int pieces = p.padded_in() / 8;
    for (int r = 0; r < p.rows; ++r)
      for (int i = static_cast<int>(threadIdx.x); i < pieces; i += kFewRowsThreads)
        *reinterpret_cast<uint4*>(x + r * p.x_stride + i * 8) =
            i * 8 < p.in ? *reinterpret_cast<const uint4*>(data + r * stride + i * 8) : uint4{0, 0, 0, 0};
    __syncthreads();
  }
};

// kMayBeWide: more than 8 rows of x may come.
template <typename T, bool kMayBeWide = true, typename Input, typename Output>
void launch_few_rows(Context& ctx, std::string_view name, const FewRowsPlan& plan, FewRowsWeights p,
                     const Input& input, const Output& output) {
  p.steps = plan.steps;
  p.x_stride = plan.x_stride;
  const auto launch = [&](const auto kernel) {
    cuda::launch_overlapping(ctx, name, kernel, dim3(static_cast<unsigned>(plan.blocks)),
                             dim3(kFewRowsThreads), static_cast<std::size_t>(plan.shared), p, input, output);
  };
  if constexpr (kMayBeWide)
    if (p.rows > 8)
      return plan.tiles == 1 ? launch(few_rows<T, 1, true, Input, Output>)
                             : launch(few_rows<T, 2, true, Input, Output>);
  switch (plan.tiles) {
    case 1: return launch(few_rows<T, 1, false, Input, Output>);
    case 2: return launch(few_rows<T, 2, false, Input, Output>);
    default: return launch(few_rows<T, 4, false, Input, Output>);
  }
}

// Whether weights lie as the kernel reads them, on a device that has its instructions.
inline bool few_rows_fit(const Context& ctx, const Tensor& weight) {
#ifdef __HIP_PLATFORM_AMD__
  return false;
#endif
  return cuda::limits_of(ctx).compute_capability >= 80 &&
         (weight.dtype() == DType::f16 || weight.dtype() == DType::bf16) && weight.stride(1) == 1 &&
         weight.size(1) % 8 == 0 && (weight.size(0) == 1 || weight.stride(0) % 8 == 0) &&
         reinterpret_cast<std::uintptr_t>(weight.raw()) % 16 == 0;
}

}  // namespace krait::linear_detail
