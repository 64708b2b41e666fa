// Rows in shares, whose sums over rows (dweight, dbias) a second kernel adds: the same bits in every run.
#pragma once

#include <algorithm>

#include "core/cuda/overlap.cuh"
#include "ops/norm/kernels.h"

namespace krait::norm_kernels {

// Where sums over the rows of each share are put: (shares, channels) f32.
struct Sums {
  float* dweight = nullptr;
  float* dbias = nullptr;
};

// How rows are shared out: each share is the work of one block (or of a warp of one). Shares side by side
// have rows side by side, so that what is worked on at a time lies together in memory. Multiprocessors do not
// get rows at one speed: the first shares, one for each block that the device holds at once, have most of the
// rows, and the short ones behind them go to who is done first.
struct Shares {
  std::int64_t rows = 0;
  std::int64_t count = 0;
  std::int64_t long_ones = 0;
  std::int64_t rows_of_long_ones = 0;

  // The rows of a share: from the first one on every step-th, in front of the end.
  struct Range {
    std::int64_t first;
    std::int64_t step;
    std::int64_t end;
  };
  __device__ Range of(std::int64_t share) const {
    if (share < long_ones) return {share, long_ones, rows_of_long_ones};
    return {rows_of_long_ones + share - long_ones, count - long_ones, rows};
  }
};

// to[c] += the sum of partial[s][c] over all shares s.
struct SumOfShares {
  const float* partial = nullptr;
  float* to = nullptr;
  std::int64_t stride = 1;

  SumOfShares() = default;
  SumOfShares(const Tensor& shares, const Rows& rows)
      : partial(shares.data<float>()), to(static_cast<float*>(rows.row(0))), stride(rows.channel_stride()) {}
};

// One of two sums for each blockIdx.y. A thread takes every kDepth-th share of a channel, and what they found
// is added in a fixed order. Few channels a block and many loads on their way: the time is that of few loads
// one after the other.
inline constexpr int kWidthOfSums = 8;
inline constexpr int kDepth = 64;
inline constexpr int kAtOnce = 8;

static __global__ void __launch_bounds__(kWidthOfSums* kDepth)
    add_shares(const SumOfShares dweight, const SumOfShares dbias, int shares, std::int64_t channels) {
  constexpr int kDepthOfWarp = 32 / kWidthOfSums;
  __shared__ float found[kDepth / kDepthOfWarp][kWidthOfSums];
  const bool first = blockIdx.y == 0;
  const float* const partial = first ? dweight.partial : dbias.partial;
  float* const to = first ? dweight.to : dbias.to;
  const std::int64_t stride = first ? dweight.stride : dbias.stride;
  const std::int64_t c = std::int64_t{blockIdx.x} * kWidthOfSums + threadIdx.x;
  const float* const last = partial + (shares - 1) * channels + (c < channels ? c : 0);
  const std::int64_t depth = kDepth * channels;
  const float* from = last - (shares - 1 - static_cast<int>(threadIdx.y)) * channels;
  cuda::wait_for_previous();
  float sum = 0.0F;
  for (int share = static_cast<int>(threadIdx.y); share < shares; share += kDepth * kAtOnce) {
    float values[kAtOnce];
    // Beyond the last share that is read again, which spares the loads a condition that they would wait for.
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i, from += depth) values[i] = *(from < last ? from : last);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += share + i * kDepth < shares ? values[i] : 0.0F;
  }
#pragma unroll
  for (int step = kWidthOfSums; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffU, sum, step);
  if (threadIdx.y % kDepthOfWarp == 0) found[threadIdx.y / kDepthOfWarp][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || c >= channels) return;
#pragma unroll
  for (int warp = 1; warp < kDepth / kDepthOfWarp; ++warp) sum += found[warp][threadIdx.x];
  to[c * stride] += sum;
}

// Shares to fill the device, of rows enough to be worth their sums.
inline Shares shares_of(const Context& ctx, const BackwardProblem& p, std::int64_t blocks_each,
                        int side_by_side) {
  const std::int64_t blocks = blocks_each * cuda::limits_of(ctx).multiprocessors;
  const std::int64_t at_once = std::max<std::int64_t>(blocks / (p.channels / p.group_size), 1) * side_by_side;
  if (p.rows >= 16 * at_once)
    return {.rows = p.rows,
            .count = 2 * at_once,
            .long_ones = at_once,
            .rows_of_long_ones = p.rows * 3 / 4 / at_once * at_once};
  const std::int64_t count = std::min(at_once, std::max<std::int64_t>(p.rows / 8, 1));
  return {.rows = p.rows, .count = count, .long_ones = count, .rows_of_long_ones = p.rows};
}

// Where blocks put the sums of their shares.
struct Partial {
  Tensor dweight;
  Tensor dbias;
  Sums sums;

  Partial(Context& ctx, const BackwardProblem& p, std::int64_t shares) {
    if (p.dweight) dweight = ctx.empty({shares, p.channels});
    if (p.dbias) dbias = ctx.empty({shares, p.channels});
    sums = {.dweight = dweight ? dweight.data<float>() : nullptr,
            .dbias = dbias ? dbias.data<float>() : nullptr};
  }
  void add_to(Context& ctx, const BackwardProblem& p) const {
    const SumOfShares of_weight = dweight ? SumOfShares(dweight, p.dweight) : SumOfShares();
    const SumOfShares of_bias = dbias ? SumOfShares(dbias, p.dbias) : SumOfShares();
    const int count = (dweight ? 1 : 0) + (dbias ? 1 : 0);
    if (count == 0) return;
    const auto blocks = static_cast<unsigned>((p.channels + kWidthOfSums - 1) / kWidthOfSums);
    cuda::launch_overlapping(ctx, "norm_backward", add_shares, dim3(blocks, static_cast<unsigned>(count)),
                             dim3(kWidthOfSums, kDepth), 0, dweight ? of_weight : of_bias, of_bias,
                             static_cast<int>((dweight ? dweight : dbias).size(0)), p.channels);
  }
};

}  // namespace krait::norm_kernels
