// The partial sums of the backward, added up in an order that the shape alone gives.
#include <algorithm>
#include <cstdint>

#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"

namespace krait::scan {
namespace {

constexpr int kThreads = 256;
constexpr int kSlices = 8;  // threads that share the terms of a sum

// gradient(row, group, n, t) = the sum over tiles (and over groups, where one serves all) of
// sums(tile, row, t, group, part, n).
struct TokenSum {
  AnyView<4> gradient;
  std::int64_t gradient_groups = 0;
  std::int64_t count = 0;  // of (row, t, group, part, n)
  const float* sums = nullptr;
};
struct TokenSums {
  TokenSum of[2];  // dB and dC
  std::int64_t tiles = 0;
  std::int64_t rows = 0;
  std::int64_t length = 0;
  std::int64_t groups = 0;
  std::int64_t numbers = 0;
  std::int64_t d_state = 0;
};

// The sum i of (row, t, group, part, n).
template <typename Index>
__device__ __forceinline__ void store_token(const TokenSums& all, const TokenSum& one, Index i, float sum) {
  const auto d_state = static_cast<Index>(all.d_state);
  const auto numbers = static_cast<Index>(all.numbers);
  const auto groups = static_cast<Index>(one.gradient_groups);
  const auto length = static_cast<Index>(all.length);
  const Index n = i % d_state;
  const Index part = i / d_state % numbers;
  const Index group = i / (d_state * numbers) % groups;
  const Index token = i / (d_state * numbers * groups);
  one.gradient.store(sum, token / length, group, n, std::int64_t{numbers} * (token % length) + part);
}

// A lane has kTogether sums side by side, and kSlices warps take every kSlices-th term of a warp's sums each.
template <int kTogether>
__global__ void __launch_bounds__(kThreads) finish_tokens(TokenSums all) {
  constexpr int kSums = 32 * kTogether;  // of a warp
  struct alignas(4 * kTogether) Sums {
    float v[kTogether];
  };
  __shared__ Sums shared[kSlices][32];
  const TokenSum& one = all.of[blockIdx.y];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int slice = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t size = all.numbers * all.d_state;  // of a group
  for (std::int64_t first = std::int64_t{blockIdx.x} * kSums; first < one.count;
       first += std::int64_t{gridDim.x} * kSums) {
    const std::int64_t i = first + lane * kTogether;
    // Divisions of 64 bits would take longer than the sums.
    const std::int64_t summed = one.gradient_groups == all.groups ? 1 : all.groups / one.gradient_groups;
    const float* const from = one.sums + (summed == 1 ? i : i / size * summed * size + i % size);
    const std::int64_t stride = all.rows * all.length * all.groups * size;
    Sums sums = {};
    if (i < one.count)
      for (std::int64_t g = 0; g < summed; ++g)
#pragma unroll 8
        for (std::int64_t tile = slice; tile < all.tiles; tile += kSlices) {
          const Sums terms = *reinterpret_cast<const Sums*>(from + tile * stride + g * size);
#pragma unroll
          for (int j = 0; j < kTogether; ++j) sums.v[j] += terms.v[j];
        }
    shared[slice][lane] = sums;
    __syncthreads();
    if (const int j = static_cast<int>(threadIdx.x); j < kSums && first + j < one.count) {
      float sum = shared[0][j / kTogether].v[j % kTogether];
#pragma unroll
      for (int other = 1; other < kSlices; ++other) sum += shared[other][j / kTogether].v[j % kTogether];
      if (one.count <= INT32_MAX)
        store_token(all, one, static_cast<std::uint32_t>(first + j), sum);
      else
        store_token(all, one, first + j, sum);
    }
    __syncthreads();
  }
}

// gradient(d, n) += the sum over pieces of sums(piece, part, n, d), for each gradient of a parameter.
struct ParameterSum {
  void* gradient = nullptr;  // c64 as pairs of f32
  DType dtype = DType::f32;
  std::int64_t stride[2] = {};
  std::int64_t numbers = 0;
  std::int64_t d_state = 0;
  const float* sums = nullptr;
};
struct ParameterSums {
  ParameterSum of[5];
  std::int64_t pieces = 0;
  std::int64_t channels = 0;
};

__global__ void __launch_bounds__(kThreads) finish_parameters(ParameterSums all) {
  const ParameterSum& one = all.of[blockIdx.y];
  const std::int64_t size = one.numbers * one.d_state;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all.channels * size;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t d = i % all.channels;
    const std::int64_t number = i / all.channels;
    float sum = 0.0F;
#pragma unroll 8
    for (std::int64_t piece = 0; piece < all.pieces; ++piece)
      sum += one.sums[(piece * size + number) * all.channels + d];
    const std::int64_t at = d * one.stride[0] + number % one.d_state * one.stride[1] + number / one.d_state;
    cuda::store_float(one.gradient, one.dtype, at, cuda::load_float(one.gradient, one.dtype, at) + sum);
  }
}

}  // namespace

PartialSums make_sums(Context& ctx, const Problem& p, const Gradients& gradients, std::int64_t tiles,
                      std::int64_t pieces) {
  const std::int64_t numbers = p.complex ? 2 : 1;
  PartialSums sums{.tiles = tiles, .pieces = pieces};
  const auto of_tokens = [&](const Tensor& gradient) {
    if (!gradient || gradient.ndim() != 4) return Tensor();
    const Dims shape = {tiles, p.u.size(0) * p.u.size(2), p.groups, numbers * p.d_state};
    // No kernel visits padding.
    return p.runs.padding.empty() ? ctx.empty(shape) : ctx.zeros(shape);
  };
  const auto of_matrix = [&](const Tensor& gradient) {
    return gradient && gradient.ndim() == 2 ? ctx.empty({pieces, numbers * p.d_state, p.channels}) : Tensor();
  };
  const auto of_vector = [&](const Tensor& gradient) {
    return gradient ? ctx.empty({pieces, p.channels}) : Tensor();
  };
  sums.dB = of_tokens(gradients.dB);
  sums.dC = of_tokens(gradients.dC);
  sums.dA = of_matrix(gradients.dA);
  sums.constant_dB = of_matrix(gradients.dB);
  sums.constant_dC = of_matrix(gradients.dC);
  sums.dD = of_vector(gradients.dD);
  sums.ddelta_bias = of_vector(gradients.ddelta_bias);
  return sums;
}

void finish_sums(Context& ctx, const Problem& p, const Gradients& gradients, const PartialSums& sums) {
  const std::int64_t numbers = p.complex ? 2 : 1;
  TokenSums tokens = {.tiles = sums.tiles,
                      .rows = p.u.size(0),
                      .length = p.u.size(2),
                      .groups = p.groups,
                      .numbers = numbers,
                      .d_state = p.d_state};
  unsigned count = 0;
  std::int64_t most = 0;
  const auto add_tokens = [&](const Tensor& gradient, const Tensor& from) {
    if (!from || gradient.numel() == 0) return;
    tokens.of[count++] = {AnyView<4>(gradient), gradient.size(1), gradient.numel(),
                          static_cast<const float*>(from.raw())};
    most = std::max(most, gradient.numel());
  };
  add_tokens(gradients.dB, sums.dB);
  add_tokens(gradients.dC, sums.dC);
  if (count > 0) {
    const int together = p.d_state % 4 == 0 ? 4 : 1;  // within a group, and aligned
    cuda::launch(ctx, "selective_scan_sum_tokens", together == 4 ? finish_tokens<4> : finish_tokens<1>,
                 dim3(cuda::blocks_for(ctx, most, 32 * together, 64), count), dim3(kThreads), 0, tokens);
  }

  ParameterSums parameters = {.pieces = sums.pieces, .channels = p.channels};
  count = 0;
  most = 0;
  const auto add_parameter = [&](const Tensor& gradient, const Tensor& from) {
    if (!from || gradient.numel() == 0) return;
    const bool complex = gradient.dtype() == DType::c64;
    const Tensor matrix = gradient.ndim() == 1 ? gradient.unsqueeze(1) : gradient;
    const std::int64_t each = complex ? 2 : 1;
    parameters.of[count++] = {matrix.raw(),
                              complex ? DType::f32 : gradient.dtype(),
                              {each * matrix.stride(0), each * matrix.stride(1)},
                              each,
                              matrix.size(1),
                              static_cast<const float*>(from.raw())};
    most = std::max(most, each * matrix.numel());
  };
  add_parameter(gradients.dA, sums.dA);
  add_parameter(gradients.dB, sums.constant_dB);
  add_parameter(gradients.dC, sums.constant_dC);
  add_parameter(gradients.dD, sums.dD);
  add_parameter(gradients.ddelta_bias, sums.ddelta_bias);
  if (count > 0)
    cuda::launch(ctx, "selective_scan_sum_parameters", finish_parameters,
                 dim3(cuda::blocks_for(ctx, most, kThreads), count), dim3(kThreads), 0, parameters);
}

}  // namespace krait::scan
