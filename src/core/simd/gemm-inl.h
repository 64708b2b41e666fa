// gemm: C (m, n) = or += A (m, k) B (k, n) on one thread, in f32, for any strides of all three and
// elements of f32, bf16 or f16 in A and B. The structure is that of Goto and van de Geijn ("Anatomy of
// high-performance matrix multiplication", 2008): blocks of A and B are copied into panels (widened to
// f32, padded with zeros to whole tiles), and a tile of C is held in registers while k runs.
//
// Each element of C is summed in the order of k within blocks of kDepth, whatever m and n are: splitting
// rows or columns of C among threads, or computing a row alone, gives the same bits.
#if defined(KRAIT_CORE_SIMD_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_CORE_SIMD_GEMM_INL_H_
#undef KRAIT_CORE_SIMD_GEMM_INL_H_
#else
#define KRAIT_CORE_SIMD_GEMM_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/simd/convert-inl.h"
#include "core/simd/gemm.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {
namespace gemm_detail {
namespace hn = hwy::HWY_NAMESPACE;

using V = hn::Vec<hn::ScalableTag<float>>;
inline constexpr int kLanes = static_cast<int>(hn::MaxLanes(hn::ScalableTag<float>()));

// The tile fills the registers: kTileRows x kTileVectors accumulators, kTileVectors of B, one of A.
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
inline constexpr int kTileRows = 14;
inline constexpr int kTileVectors = 2;
#elif HWY_ARCH_ARM_A64
inline constexpr int kTileRows = 8;
inline constexpr int kTileVectors = 3;
#else
inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = 2;
#endif
inline constexpr int kTileColumns = kTileVectors * kLanes;
static_assert(kTileRows <= gemm_limits::kMaxTileRows && kTileColumns <= gemm_limits::kMaxTileColumns);
static_assert(gemm_limits::kRows % kTileRows == 0 && gemm_limits::kColumns % kTileColumns == 0);

// Packed A: one panel of `depth` x kTileRows floats for each kTileRows rows. Inside a panel either k is
// contiguous (rows are `depth` apart) or rows are (steps in k are kTileRows apart), as in the source, so
// that packing copies and does not transpose.
struct PanelStrides {
  std::int64_t row;
  std::int64_t step;
};

template <typename T>
PanelStrides pack_a(Strided<const T> a, std::int64_t rows, std::int64_t depth, float* HWY_RESTRICT packed) {
  const hn::ScalableTag<float> d;
  const bool k_contiguous = a.column_stride == 1;
  const PanelStrides panel = k_contiguous ? PanelStrides{depth, 1} : PanelStrides{1, kTileRows};
  for (std::int64_t i0 = 0; i0 < rows; i0 += kTileRows, packed += kTileRows * depth) {
    const std::int64_t valid = std::min<std::int64_t>(kTileRows, rows - i0);
    const T* source = a.data + i0 * a.row_stride;
    if (valid < kTileRows) std::fill_n(packed, kTileRows * depth, 0.0F);
    if (k_contiguous) {
      for (std::int64_t i = 0; i < valid; ++i) {
        const T* from = source + i * a.row_stride;
        float* to = packed + i * depth;
        std::int64_t p = 0;
        for (; p + kLanes <= depth; p += kLanes) hn::StoreU(load_f32(d, from + p), d, to + p);
        for (; p < depth; ++p) to[p] = static_cast<float>(from[p]);
      }
    } else if (a.row_stride == 1 && valid == kTileRows) {
      for (std::int64_t p = 0; p < depth; ++p) {
        const T* from = source + p * a.column_stride;
        for (int i = 0; i < kTileRows; ++i) packed[p * kTileRows + i] = static_cast<float>(from[i]);
      }
    } else {
      for (std::int64_t p = 0; p < depth; ++p)
        for (std::int64_t i = 0; i < valid; ++i)
          packed[p * kTileRows + i] = static_cast<float>(source[p * a.column_stride + i * a.row_stride]);
    }
  }
  return panel;
}

// kSquare columns of B, each contiguous in k, by kSquare steps of k are transposed in registers.
using Square = hn::CappedTag<float, 8>;
inline constexpr int kSquare = static_cast<int>(hn::MaxLanes(Square()));

#if HWY_TARGET == HWY_SCALAR
template <typename T>
HWY_INLINE void pack_square(const T* HWY_RESTRICT from, std::int64_t, float* HWY_RESTRICT to) {
  *to = static_cast<float>(*from);
}
#else
// Transposes 4 x 4 within each 128 bits.
HWY_INLINE void transpose_blocks(hn::Vec<Square>& a, hn::Vec<Square>& b, hn::Vec<Square>& c,
                                 hn::Vec<Square>& e) {
  const Square d;
  const hn::Repartition<std::uint64_t, Square> pairs;
  const auto low_ab = hn::BitCast(pairs, hn::InterleaveLower(d, a, b));
  const auto low_ce = hn::BitCast(pairs, hn::InterleaveLower(d, c, e));
  const auto high_ab = hn::BitCast(pairs, hn::InterleaveUpper(d, a, b));
  const auto high_ce = hn::BitCast(pairs, hn::InterleaveUpper(d, c, e));
  a = hn::BitCast(d, hn::InterleaveLower(pairs, low_ab, low_ce));
  b = hn::BitCast(d, hn::InterleaveUpper(pairs, low_ab, low_ce));
  c = hn::BitCast(d, hn::InterleaveLower(pairs, high_ab, high_ce));
  e = hn::BitCast(d, hn::InterleaveUpper(pairs, high_ab, high_ce));
}

template <typename T>
HWY_INLINE void pack_square(const T* HWY_RESTRICT from, std::int64_t column_stride, float* HWY_RESTRICT to) {
  const Square d;
  hn::Vec<Square> v[kSquare];
  for (int q = 0; q < kSquare; ++q) v[q] = load_f32(d, from + q * column_stride);
  for (int q = 0; q < kSquare; q += 4) transpose_blocks(v[q], v[q + 1], v[q + 2], v[q + 3]);
  if constexpr (kSquare == 4) {
    for (int p = 0; p < 4; ++p) hn::StoreU(v[p], d, to + p * kTileColumns);
  } else {
    for (int p = 0; p < 4; ++p) {
      hn::StoreU(hn::ConcatLowerLower(d, v[p + 4], v[p]), d, to + p * kTileColumns);
      hn::StoreU(hn::ConcatUpperUpper(d, v[p + 4], v[p]), d, to + (p + 4) * kTileColumns);
    }
  }
}
#endif

// Packed B: one panel for each kTileColumns columns; steps in k are kTileColumns apart.
template <typename T>
void pack_b(Strided<const T> b, std::int64_t columns, std::int64_t depth, float* HWY_RESTRICT packed) {
  const hn::ScalableTag<float> d;
  for (std::int64_t j0 = 0; j0 < columns; j0 += kTileColumns, packed += kTileColumns * depth) {
    const std::int64_t valid = std::min<std::int64_t>(kTileColumns, columns - j0);
    const T* source = b.data + j0 * b.column_stride;
    if (valid < kTileColumns) std::fill_n(packed, kTileColumns * depth, 0.0F);
    if (b.column_stride == 1) {
      for (std::int64_t p = 0; p < depth; ++p) {
        const T* from = source + p * b.row_stride;
        float* to = packed + p * kTileColumns;
        std::int64_t j = 0;
        for (; j + kLanes <= valid; j += kLanes) hn::StoreU(load_f32(d, from + j), d, to + j);
        for (; j < valid; ++j) to[j] = static_cast<float>(from[j]);
      }
      continue;
    }
    std::int64_t j = 0;
    if (b.row_stride == 1) {
      for (; j + kSquare <= valid; j += kSquare) {
        const T* from = source + j * b.column_stride;
        float* to = packed + j;
        std::int64_t p = 0;
        for (; p + kSquare <= depth; p += kSquare)
          pack_square(from + p, b.column_stride, to + p * kTileColumns);
        for (; p < depth; ++p)
          for (int q = 0; q < kSquare; ++q)
            to[p * kTileColumns + q] = static_cast<float>(from[p + q * b.column_stride]);
      }
    }
    for (; j < valid; ++j)
      for (std::int64_t p = 0; p < depth; ++p)
        packed[p * kTileColumns + j] = static_cast<float>(source[p * b.row_stride + j * b.column_stride]);
  }
}

// One tile: `rows` x `columns` of C from a panel of A and a panel of B. Steps in k are `b_step` apart in B, a
// whole number of vectors: a matrix with aligned rows is read where it lies.
inline HWY_NOINLINE void multiply_tile(const float* HWY_RESTRICT a, PanelStrides panel,
                                       const float* HWY_RESTRICT b, std::int64_t depth, Strided<float> c,
                                       std::int64_t rows, std::int64_t columns, bool add,
                                       std::int64_t b_step = kTileColumns) {
  const hn::ScalableTag<float> d;
  V sum[kTileRows][kTileVectors];
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kTileVectors; ++v) sum[i][v] = hn::Zero(d);

  for (std::int64_t p = 0; p < depth; ++p, a += panel.step, b += b_step) {
    V column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) column[v] = hn::Load(d, b + v * kLanes);
    for (int i = 0; i < kTileRows; ++i) {
      const V row = hn::Set(d, a[i * panel.row]);
      for (int v = 0; v < kTileVectors; ++v) sum[i][v] = hn::MulAdd(row, column[v], sum[i][v]);
    }
  }

  if (rows == kTileRows && columns == kTileColumns && c.column_stride == 1) {
    for (int i = 0; i < kTileRows; ++i) {
      float* to = c.data + i * c.row_stride;
      for (int v = 0; v < kTileVectors; ++v) {
        const V value = add ? hn::Add(hn::LoadU(d, to + v * kLanes), sum[i][v]) : sum[i][v];
        hn::StoreU(value, d, to + v * kLanes);
      }
    }
    return;
  }
  HWY_ALIGN float tile[kTileRows * kTileColumns];
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kTileVectors; ++v) hn::Store(sum[i][v], d, tile + i * kTileColumns + v * kLanes);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      float& to = c.data[i * c.row_stride + j * c.column_stride];
      to = (add ? to : 0.0F) + tile[i * kTileColumns + j];
    }
  }
}

}  // namespace gemm_detail

// C = A B, or C += A B where `add`. `workspace` has gemm_workspace(m, n, k) floats, aligned to 64 bytes.
// C may not overlap A or B. With k = 0 the product is 0.
template <typename TA, typename TB>
void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Strided<const TA> a, Strided<const TB> b,
          Strided<float> c, bool add, float* HWY_RESTRICT workspace) {
  namespace g = gemm_detail;
  if (k == 0 && !add) {
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t j = 0; j < n; ++j) c.data[i * c.row_stride + j * c.column_stride] = 0.0F;
  }
  // Panels of B come first: their rows are whole vectors, so that every load of B is aligned.
  float* packed_b = workspace;
  float* packed_a =
      workspace + std::min(n + g::kTileColumns, gemm_limits::kColumns) * std::min(k, gemm_limits::kDepth);
  for (std::int64_t j0 = 0; j0 < n; j0 += gemm_limits::kColumns) {
    const std::int64_t columns = std::min(gemm_limits::kColumns, n - j0);
    for (std::int64_t p0 = 0; p0 < k; p0 += gemm_limits::kDepth) {
      const std::int64_t depth = std::min(gemm_limits::kDepth, k - p0);
      g::pack_b(
          Strided<const TB>{b.data + p0 * b.row_stride + j0 * b.column_stride, b.row_stride, b.column_stride},
          columns, depth, packed_b);
      for (std::int64_t i0 = 0; i0 < m; i0 += gemm_limits::kRows) {
        const std::int64_t rows = std::min(gemm_limits::kRows, m - i0);
        const auto panel = g::pack_a(Strided<const TA>{a.data + i0 * a.row_stride + p0 * a.column_stride,
                                                       a.row_stride, a.column_stride},
                                     rows, depth, packed_a);
        for (std::int64_t j = 0; j < columns; j += g::kTileColumns) {
          for (std::int64_t i = 0; i < rows; i += g::kTileRows) {
            g::multiply_tile(packed_a + i * depth, panel, packed_b + j * depth, depth,
                             Strided<float>{c.data + (i0 + i) * c.row_stride + (j0 + j) * c.column_stride,
                                            c.row_stride, c.column_stride},
                             std::min<std::int64_t>(g::kTileRows, rows - i),
                             std::min<std::int64_t>(g::kTileColumns, columns - j), add || p0 > 0);
          }
        }
      }
    }
  }
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_CORE_SIMD_GEMM_INL_H_
