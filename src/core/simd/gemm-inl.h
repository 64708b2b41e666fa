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

#include <hwy/cache_control.h>
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

// Where a tile finds its rows of A: rows are `row` apart, steps in k `step`.
struct PanelStrides {
  std::int64_t row;
  std::int64_t step;
};

// kSquare rows, each contiguous in k, by kSquare steps of k are transposed in registers.
using Square = hn::CappedTag<float, 8>;
inline constexpr int kSquare = static_cast<int>(hn::MaxLanes(Square()));

#if HWY_TARGET == HWY_SCALAR
HWY_INLINE void transpose_square(hn::Vec<Square> (&)[kSquare]) {}
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

HWY_INLINE void transpose_square(hn::Vec<Square> (&v)[kSquare]) {
  for (int q = 0; q < kSquare; q += 4) transpose_blocks(v[q], v[q + 1], v[q + 2], v[q + 3]);
  if constexpr (kSquare == 8) {
    const Square d;
    for (int p = 0; p < 4; ++p) {
      const auto low = v[p];
      v[p] = hn::ConcatLowerLower(d, v[p + 4], low);
      v[p + 4] = hn::ConcatUpperUpper(d, v[p + 4], low);
    }
  }
}
#endif

// Rows of the source that are packed before the next panel's turn, where a panel takes but a piece of each:
// the rest is still in the first cache, and few pages are in use at a time.
inline constexpr std::int64_t kPackedSteps = 16;

// Packed A: one panel for each kTileRows rows; steps in k are kTileRows apart. Vectors that reach beyond the
// rows of their step are stored before what they reach into; behind the last panel are up to kSquare - 1
// floats more.
template <typename T>
void pack_a(Strided<const T> a, std::int64_t rows, std::int64_t depth, float* HWY_RESTRICT packed) {
  const Square d;
  constexpr int kLastSquare = (kTileRows - 1) / kSquare * kSquare;
  const auto copy = [&](std::int64_t i0, std::int64_t begin, std::int64_t end) {
    const std::int64_t valid = std::min<std::int64_t>(kTileRows, rows - i0);
    for (std::int64_t p = begin; p < end; ++p) {
      float* to = packed + i0 * depth + p * kTileRows;
      const T* from = a.data + i0 * a.row_stride + p * a.column_stride;
      for (std::int64_t i = 0; i < kTileRows; ++i)
        to[i] = i < valid ? static_cast<float>(from[i * a.row_stride]) : 0.0F;
    }
  };
  if (a.column_stride == 1) {
    for (std::int64_t i0 = 0; i0 < rows; i0 += kTileRows) {
      const std::int64_t valid = std::min<std::int64_t>(kTileRows, rows - i0);
      const T* source = a.data + i0 * a.row_stride;
      float* panel = packed + i0 * depth;
      std::int64_t p = 0;
      for (; p + kSquare <= depth; p += kSquare) {
        for (int r = kLastSquare; r >= 0; r -= kSquare) {
          hn::Vec<Square> v[kSquare];
          for (int q = 0; q < kSquare; ++q)
            v[q] = r + q < valid ? load_f32(d, source + (r + q) * a.row_stride + p) : hn::Zero(d);
          transpose_square(v);
          for (int q = 0; q < kSquare; ++q) hn::StoreU(v[q], d, panel + (p + q) * kTileRows + r);
        }
      }
      copy(i0, p, depth);
    }
    return;
  }
  for (std::int64_t p0 = 0; p0 < depth; p0 += kPackedSteps) {
    const std::int64_t end = std::min(p0 + kPackedSteps, depth);
    for (std::int64_t i0 = 0; i0 < rows; i0 += kTileRows) {
      if (a.row_stride != 1 || i0 + kLastSquare + kSquare > rows) {
        copy(i0, p0, end);
        continue;
      }
      const std::int64_t last = std::min(end, depth - 1);
      for (std::int64_t p = p0; p < last; ++p) {
        const T* from = a.data + i0 + p * a.column_stride;
        float* to = packed + i0 * depth + p * kTileRows;
        hn::Vec<Square> v[kLastSquare / kSquare + 1];
        for (int r = 0; r <= kLastSquare; r += kSquare) v[r / kSquare] = load_f32(d, from + r);
        for (int r = 0; r <= kLastSquare; r += kSquare) hn::StoreU(v[r / kSquare], d, to + r);
      }
      copy(i0, last, end);
    }
  }
}

// Packed B: one panel for each kTileColumns columns; steps in k are kTileColumns apart.
template <typename T>
void pack_b(Strided<const T> b, std::int64_t columns, std::int64_t depth, float* HWY_RESTRICT packed) {
  const hn::ScalableTag<float> d;
  if (b.column_stride == 1) {
    for (std::int64_t p0 = 0; p0 < depth; p0 += kPackedSteps) {
      const std::int64_t end = std::min(p0 + kPackedSteps, depth);
      for (std::int64_t j0 = 0; j0 < columns; j0 += kTileColumns) {
        const std::int64_t valid = std::min<std::int64_t>(kTileColumns, columns - j0);
        for (std::int64_t p = p0; p < end; ++p) {
          const T* from = b.data + j0 + p * b.row_stride;
          float* to = packed + j0 * depth + p * kTileColumns;
          std::int64_t j = 0;
          for (; j + kLanes <= valid; j += kLanes) hn::StoreU(load_f32(d, from + j), d, to + j);
          for (; j < kTileColumns; ++j) to[j] = j < valid ? static_cast<float>(from[j]) : 0.0F;
        }
      }
    }
    return;
  }
  const Square square;
  for (std::int64_t j0 = 0; j0 < columns; j0 += kTileColumns, packed += kTileColumns * depth) {
    const std::int64_t valid = std::min<std::int64_t>(kTileColumns, columns - j0);
    const T* source = b.data + j0 * b.column_stride;
    if (valid < kTileColumns) std::fill_n(packed, kTileColumns * depth, 0.0F);
    std::int64_t j = 0;
    if (b.row_stride == 1) {
      for (; j + kSquare <= valid; j += kSquare) {
        const T* from = source + j * b.column_stride;
        float* to = packed + j;
        std::int64_t p = 0;
        for (; p + kSquare <= depth; p += kSquare) {
          hn::Vec<Square> v[kSquare];
          for (int q = 0; q < kSquare; ++q) v[q] = load_f32(square, from + p + q * b.column_stride);
          transpose_square(v);
          for (int q = 0; q < kSquare; ++q) hn::StoreU(v[q], square, to + (p + q) * kTileColumns);
        }
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

using Sums = V[kTileRows][kTileVectors];

// Adds the product of one step in k.
HWY_INLINE void multiply_step(const float* HWY_RESTRICT a, std::int64_t row, const float* HWY_RESTRICT b,
                              Sums& sum) {
  const hn::ScalableTag<float> d;
  V column[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) column[v] = hn::Load(d, b + v * kLanes);
  for (int i = 0; i < kTileRows; ++i) {
    const V value = hn::Set(d, a[i * row]);
    for (int v = 0; v < kTileVectors; ++v) sum[i][v] = hn::MulAdd(value, column[v], sum[i][v]);
  }
}

// C = or += the sums, of which `rows` x `columns` are inside of C.
HWY_INLINE void store_tile(const Sums& sum, Strided<float> c, std::int64_t rows, std::int64_t columns,
                           bool add) {
  const hn::ScalableTag<float> d;
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

// One tile: `rows` x `columns` of C from a panel of A and a panel of B. Steps in k are `b_step` apart in B, a
// whole number of vectors: a matrix with aligned rows is read where it lies.
inline HWY_NOINLINE void multiply_tile(const float* HWY_RESTRICT a, PanelStrides panel,
                                       const float* HWY_RESTRICT b, std::int64_t depth, Strided<float> c,
                                       std::int64_t rows, std::int64_t columns, bool add,
                                       std::int64_t b_step = kTileColumns) {
  const hn::ScalableTag<float> d;
  Sums sum;
  for (auto& row : sum)
    for (V& value : row) value = hn::Zero(d);
  for (std::int64_t p = 0; p < depth; ++p, a += panel.step, b += b_step) multiply_step(a, panel.row, b, sum);
  store_tile(sum, c, rows, columns, add);
}

// The same of packed panels, whose strides are constants.
inline HWY_NOINLINE void multiply_packed(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b,
                                         std::int64_t depth, Strided<float> c, std::int64_t rows,
                                         std::int64_t columns, bool add) {
  const hn::ScalableTag<float> d;
  // C comes from afar while k runs.
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* row = c.data + i * c.row_stride;
    hwy::Prefetch(row);
    hwy::Prefetch(row + (columns - 1) * c.column_stride);
  }
  Sums sum;
  for (auto& row : sum)
    for (V& value : row) value = hn::Zero(d);
  for (std::int64_t p = 0; p < depth; ++p, a += kTileRows, b += kTileColumns) multiply_step(a, 1, b, sum);
  store_tile(sum, c, rows, columns, add);
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
        g::pack_a(Strided<const TA>{a.data + i0 * a.row_stride + p0 * a.column_stride, a.row_stride,
                                    a.column_stride},
                  rows, depth, packed_a);
        for (std::int64_t j = 0; j < columns; j += g::kTileColumns) {
          for (std::int64_t i = 0; i < rows; i += g::kTileRows) {
            g::multiply_packed(packed_a + i * depth, packed_b + j * depth, depth,
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
