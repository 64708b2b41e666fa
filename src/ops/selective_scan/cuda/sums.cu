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

// A warp has 32 sums side by side, and kSlices warps take every kSlices-th term each.
__global__ void __launch_bounds__(kThreads) finish_tokens(TokenSums all) {
  __shared__ float shared[kSlices][32];
  const TokenSum& one = all.of[blockIdx.y];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int slice = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t size = all.numbers * all.d_state;  // of a group
  for (std::int64_t first = std::int64_t{blockIdx.x} * 32; first < one.count;
       first += std::int64_t{gridDim.x} * 32) {
    const std::int64_t i = first + lane;
    const bool there = i < one.count;
    const std::int64_t in_group = i % size;
    const std::int64_t group = i / size % one.gradient_groups;
    const std::int64_t token = i / (size * one.gradient_groups);
    const std::int64_t summed = all.groups / one.gradient_groups;
    const float* const from = one.sums + (token * all.groups + group * summed) * size + in_group;
    const std::int64_t stride = all.rows * all.length * all.groups * size;
    float sum = 0.0F;
    if (there)
      for (std::int64_t g = 0; g < summed; ++g)
#pragma unroll 8
        for (std::int64_t tile = slice; tile < all.tiles; tile += kSlices)
          sum += from[tile * stride + g * size];
    shared[slice][lane] = sum;
    __syncthreads();
    if (slice == 0 && there) {
#pragma unroll
      for (int other = 1; other < kSlices; ++other) sum += shared[other][lane];
      one.gradient.store(sum, token / all.length, group, in_group % all.d_state,
                         all.numbers * (token % all.length) + in_group / all.d_state);
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
  if (count > 0)
    cuda::launch(ctx, "selective_scan_sum_tokens", finish_tokens,
                 dim3(cuda::blocks_for(ctx, most, 32, 64), count), dim3(kThreads), 0, tokens);

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
