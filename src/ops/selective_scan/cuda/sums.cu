// The partial sums of the backward, added up in the order of their tiles and pieces.
#include <cstdint>

#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"

namespace krait::scan {
namespace {

constexpr int kThreads = 256;

// gradient(row, group, n, t) = the sum over tiles (and over groups, where one serves all) of
// sums(tile, row, t, group, part, n). A thread for each (row, t, group, part, n).
__global__ void __launch_bounds__(kThreads)
    finish_tokens(AnyView<4> gradient, const float* sums, std::int64_t tiles, std::int64_t rows,
                  std::int64_t length, std::int64_t groups, std::int64_t gradient_groups,
                  std::int64_t numbers, std::int64_t d_state) {
  const std::int64_t size = numbers * d_state;  // of a group
  const std::int64_t count = rows * length * gradient_groups * size;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t n = i % d_state;
    const std::int64_t part = i / d_state % numbers;
    const std::int64_t group = i / size % gradient_groups;
    const std::int64_t token = i / (size * gradient_groups);
    const std::int64_t summed_groups = groups / gradient_groups;
    float sum = 0.0F;
    for (std::int64_t g = 0; g < summed_groups; ++g)
      for (std::int64_t tile = 0; tile < tiles; ++tile)
        sum += sums[((tile * rows * length + token) * groups + group * summed_groups + g) * size +
                    part * d_state + n];
    gradient.store(sum, token / length, group, n, numbers * (token % length) + part);
  }
}

// gradient(d, n) += the sum over pieces of sums(piece, part, n, d). A thread for each (n, d).
template <typename State>
__global__ void __launch_bounds__(kThreads)
    finish_parameters(StateView<State, 2> gradient, const float* sums, std::int64_t pieces,
                      std::int64_t channels, std::int64_t d_state) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < channels * d_state;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t d = i % channels;
    const std::int64_t n = i / channels;
    float sum[kNumbers<State>] = {};
    for (std::int64_t piece = 0; piece < pieces; ++piece)
      for (int part = 0; part < kNumbers<State>; ++part)
        sum[part] += sums[((piece * kNumbers<State> + part) * d_state + n) * channels + d];
    State total;
    if constexpr (kNumbers<State> == 1)
      total = sum[0];
    else
      total = {sum[0], sum[1]};
    gradient.set(gradient.get(d, n) + total, d, n);
  }
}

void finish(Context& ctx, const Problem& p, const Tensor& gradient, const Tensor& sums, std::int64_t pieces) {
  if (!sums || gradient.numel() == 0) return;
  const Tensor matrix = gradient.ndim() == 1 ? gradient.unsqueeze(1) : gradient;
  const std::int64_t d_state = matrix.size(1);
  const dim3 grid(cuda::blocks_for(ctx, p.channels * d_state, kThreads));
  const auto* from = static_cast<const float*>(sums.raw());
  if (gradient.dtype() == DType::c64)
    cuda::launch(ctx, "selective_scan_sum_parameters", finish_parameters<Complex>, grid, dim3(kThreads), 0,
                 StateView<Complex, 2>(matrix), from, pieces, p.channels, d_state);
  else
    cuda::launch(ctx, "selective_scan_sum_parameters", finish_parameters<float>, grid, dim3(kThreads), 0,
                 StateView<float, 2>(matrix), from, pieces, p.channels, d_state);
}

void finish(Context& ctx, const Problem& p, const Tensor& gradient, const Tensor& sums,
            const PartialSums& all) {
  if (!sums || gradient.numel() == 0) return;
  const std::int64_t numbers = p.complex ? 2 : 1;
  cuda::launch(ctx, "selective_scan_sum_tokens", finish_tokens,
               dim3(cuda::blocks_for(ctx, gradient.numel(), kThreads)), dim3(kThreads), 0,
               AnyView<4>(gradient), static_cast<const float*>(sums.raw()), all.tiles, p.u.size(0),
               p.u.size(2), p.groups, gradient.size(1), numbers, p.d_state);
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
  if (sums.dB) finish(ctx, p, gradients.dB, sums.dB, sums);
  if (sums.dC) finish(ctx, p, gradients.dC, sums.dC, sums);
  finish(ctx, p, gradients.dA, sums.dA, sums.pieces);
  if (sums.constant_dB) finish(ctx, p, gradients.dB, sums.constant_dB, sums.pieces);
  if (sums.constant_dC) finish(ctx, p, gradients.dC, sums.constant_dC, sums.pieces);
  finish(ctx, p, gradients.dD, sums.dD, sums.pieces);
  finish(ctx, p, gradients.ddelta_bias, sums.ddelta_bias, sums.pieces);
}

}  // namespace krait::scan
