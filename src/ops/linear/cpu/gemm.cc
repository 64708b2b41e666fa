// linear for many rows of x: the blocked product of core/simd/gemm-inl.h, divided among threads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear/cpu/gemm.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"
#include "core/simd/gemm-inl.h"
#include "ops/linear/cpu/finish-inl.h"
#include "ops/linear/kernels.h"

// Products whose destination has 16 bits are summed in f32 tiles of this size, then rounded.
#ifndef KRAIT_OPS_LINEAR_CPU_GEMM_TILE
#define KRAIT_OPS_LINEAR_CPU_GEMM_TILE
namespace krait::linear_detail {
inline constexpr std::int64_t kTileRows = 256;
inline constexpr std::int64_t kTileColumns = gemm_limits::kColumns;
}  // namespace krait::linear_detail
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::linear_detail::HWY_NAMESPACE {
namespace {

using krait::HWY_NAMESPACE::finish_row;

// C = x W^T of one part of the grid; C is f32.
template <typename TX, typename TWeight>
void product(const Tensor& x, const Tensor& weight, Strided<float> c, bool add, float* workspace) {
  krait::HWY_NAMESPACE::gemm(
      x.size(0), weight.size(0), x.size(1), Strided<const TX>{x.data<TX>(), x.stride(0), x.stride(1)},
      Strided<const TWeight>{weight.data<TWeight>(), weight.stride(1), weight.stride(0)}, c, add, workspace);
}

template <typename TX>
void product(const Tensor& x, const Tensor& weight, Strided<float> c, bool add, float* workspace) {
  switch (weight.dtype()) {
    case DType::bf16: return product<TX, bf16>(x, weight, c, add, workspace);
    case DType::f16: return product<TX, f16>(x, weight, c, add, workspace);
    default: return product<TX, float>(x, weight, c, add, workspace);
  }
}

void product(const Tensor& x, const Tensor& weight, Strided<float> c, bool add, float* workspace) {
  switch (x.dtype()) {
    case DType::bf16: return product<bf16>(x, weight, c, add, workspace);
    case DType::f16: return product<f16>(x, weight, c, add, workspace);
    default: return product<float>(x, weight, c, add, workspace);
  }
}

// The f32 destination holds the sums: the bias comes first, the product is added.
void part_f32(const Problem& p, const float* bias, float* workspace) {
  const Strided<float> c{p.out.data<float>(), p.out.stride(0), p.out.stride(1)};
  if (bias != nullptr) {
    for (std::int64_t r = 0; r < p.out.size(0); ++r)
      finish_row(bias, p.out.size(1), nullptr, c.data + r * c.row_stride, c.column_stride, p.accumulate);
  }
  product(p.x, p.weight, c, p.accumulate || bias != nullptr, workspace);
}

template <typename TOut>
void part_16(const Problem& p, const float* bias, float* workspace, float* tile) {
  for (std::int64_t r0 = 0; r0 < p.out.size(0); r0 += kTileRows) {
    const std::int64_t rows = std::min(kTileRows, p.out.size(0) - r0);
    for (std::int64_t o0 = 0; o0 < p.out.size(1); o0 += kTileColumns) {
      const std::int64_t columns = std::min(kTileColumns, p.out.size(1) - o0);
      product(p.x.slice(0, r0, r0 + rows), p.weight.slice(0, o0, o0 + columns),
              Strided<float>{tile, columns, 1}, false, workspace);
      TOut* out = p.out.data<TOut>() + r0 * p.out.stride(0) + o0 * p.out.stride(1);
      for (std::int64_t r = 0; r < rows; ++r)
        finish_row(tile + r * columns, columns, bias == nullptr ? nullptr : bias + o0,
                   out + r * p.out.stride(0), p.out.stride(1), p.accumulate);
    }
  }
}

void gemm_simd(const Problem& p, const float* bias, float* workspace, float* tile) {
  switch (p.out.dtype()) {
    case DType::bf16: return part_16<bf16>(p, bias, workspace, tile);
    case DType::f16: return part_16<f16>(p, bias, workspace, tile);
    default: return part_f32(p, bias, workspace);
  }
}

}  // namespace
}  // namespace krait::linear_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::linear_detail {

HWY_EXPORT(gemm_simd);

Grid choose_grid(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t threads) {
  // A thread is worth its fork from about this many products on.
  constexpr std::int64_t kProductsPerThread = 100000;
  const auto limit = static_cast<std::int64_t>(std::min(
      static_cast<double>(threads),
      static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / kProductsPerThread));
  Grid best;
  double least = 0.0;
  for (std::int64_t rows = 1; rows <= std::max<std::int64_t>(limit, 1); ++rows) {
    const std::int64_t columns = std::max<std::int64_t>(limit, 1) / rows;
    if (rows > 1 && (rows > m || columns > n)) continue;
    const auto height = static_cast<double>((m + rows - 1) / rows);
    const auto width = static_cast<double>((n + columns - 1) / columns);
    // Per step of k: the products of the part, and the packing of its columns (transposed) and rows.
    const double cost = height * width + 8.0 * width + 3.0 * height;
    if (rows == 1 || cost < least) {
      least = cost;
      best = {rows, columns};
    }
  }
  best.columns = std::min(best.columns, std::max<std::int64_t>(n, 1));
  return best;
}

void gemm(Context& ctx, const Problem& p) {
  const std::int64_t m = p.x.size(0);
  const std::int64_t n = p.weight.size(0);
  const std::int64_t k = p.x.size(1);
  const Grid grid = choose_grid(m, n, k, ctx.threads());
  const std::int64_t parts = grid.rows * grid.columns;
  const std::int64_t height = (m + grid.rows - 1) / grid.rows;
  const std::int64_t width = (n + grid.columns - 1) / grid.columns;
  const bool narrow = size_of(p.out.dtype()) == 2;
  const std::int64_t work = (gemm_workspace(height, width, k) + 15) / 16 * 16;
  const std::int64_t tile = narrow ? std::min(height, kTileRows) * std::min(width, kTileColumns) : 0;
  const Tensor workspace = ctx.empty({parts, (work + tile + 15) / 16 * 16});
  const Tensor bias = bias_as_f32(ctx, p.bias);

  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      const std::int64_t r0 = m * (part / grid.columns) / grid.rows;
      const std::int64_t r1 = m * (part / grid.columns + 1) / grid.rows;
      const std::int64_t o0 = n * (part % grid.columns) / grid.columns;
      const std::int64_t o1 = n * (part % grid.columns + 1) / grid.columns;
      const Problem piece{.x = p.x.slice(0, r0, r1),
                          .weight = p.weight.slice(0, o0, o1),
                          .out = p.out.slice(0, r0, r1).slice(1, o0, o1),
                          .accumulate = p.accumulate};
      float* space = workspace.data<float>() + part * workspace.stride(0);
      HWY_DYNAMIC_DISPATCH(gemm_simd)
      (piece, bias ? bias.data<float>() + o0 : nullptr, space, space + work);
    }
  });
}

}  // namespace krait::linear_detail
#endif
