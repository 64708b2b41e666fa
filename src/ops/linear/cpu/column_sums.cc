// The gradient of a bias: sums over rows, each column by one thread.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear/cpu/column_sums.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"
#include "core/simd/tile-inl.h"
#include "ops/linear/kernels.h"

#ifndef KRAIT_OPS_LINEAR_CPU_COLUMN_SUMS
#define KRAIT_OPS_LINEAR_CPU_COLUMN_SUMS
namespace krait::linear_detail {
// A tile stays in the first cache. Rows are summed tile by tile, so that the rounding error of a sum over
// thousands of rows grows with the number of tiles only.
inline constexpr std::int64_t kSumRows = 64;
inline constexpr std::int64_t kSumColumns = 64;
}  // namespace krait::linear_detail
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::linear_detail::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

// Adds the sums of columns [c0, c0 + columns) to bias.
void column_sums_simd(const Tensor& dout, const Tensor& bias, std::int64_t c0, std::int64_t columns) {
  const D d;
  HWY_ALIGN float tile[kSumRows * kSumColumns] = {};
  HWY_ALIGN float totals[kSumColumns] = {};
  for (std::int64_t r0 = 0; r0 < dout.size(0); r0 += kSumRows) {
    const std::int64_t rows = std::min(kSumRows, dout.size(0) - r0);
    krait::HWY_NAMESPACE::load_tile(dout.dtype(), dout.raw(), r0 * dout.stride(0) + c0 * dout.stride(1),
                                    dout.stride(0), dout.stride(1), rows, columns, tile, kSumColumns);
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      V sum = hn::Zero(d);
      for (std::int64_t r = 0; r < rows; ++r) sum = hn::Add(sum, hn::Load(d, tile + r * kSumColumns + c));
      hn::Store(hn::Add(hn::Load(d, totals + c), sum), d, totals + c);
    }
  }
  float* to = bias.data<float>() + c0 * bias.stride(0);
  for (std::int64_t c = 0; c < columns; ++c) to[c * bias.stride(0)] += totals[c];
}

}  // namespace
}  // namespace krait::linear_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::linear_detail {

HWY_EXPORT(column_sums_simd);

void column_sums(Context& ctx, const Tensor& dout, const Tensor& bias) {
  constexpr std::int64_t kElementsPerThread = 32768;
  const std::int64_t columns = dout.size(1);
  const std::int64_t blocks = (columns + kSumColumns - 1) / kSumColumns;
  const std::int64_t grain = kElementsPerThread / (kSumColumns * std::max<std::int64_t>(dout.size(0), 1)) + 1;
  parallel_for(ctx, blocks, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t c0 = block * kSumColumns;
      HWY_DYNAMIC_DISPATCH(column_sums_simd)(dout, bias, c0, std::min(kSumColumns, columns - c0));
    }
  });
}

}  // namespace krait::linear_detail
#endif
