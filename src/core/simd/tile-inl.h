// Copies between strided tensors of f32, bf16 or f16 and small dense tiles of f32, transposing in
// registers where the tensor is contiguous along the tile's rows. Included once for each SIMD target.
#if defined(KRAIT_CORE_SIMD_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_CORE_SIMD_TILE_INL_H_
#undef KRAIT_CORE_SIMD_TILE_INL_H_
#else
#define KRAIT_CORE_SIMD_TILE_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "core/simd/convert-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

namespace tile_detail {

#if HWY_TARGET != HWY_SCALAR
// Rows of `v` become columns.
template <class D, class V>
HWY_INLINE void transpose_4x4(D d, V (&v)[4]) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::Repartition<std::uint64_t, D> d64;
  const auto low01 = hn::BitCast(d64, hn::InterleaveLower(d, v[0], v[1]));
  const auto low23 = hn::BitCast(d64, hn::InterleaveLower(d, v[2], v[3]));
  const auto high01 = hn::BitCast(d64, hn::InterleaveUpper(d, v[0], v[1]));
  const auto high23 = hn::BitCast(d64, hn::InterleaveUpper(d, v[2], v[3]));
  v[0] = hn::BitCast(d, hn::InterleaveLower(d64, low01, low23));
  v[1] = hn::BitCast(d, hn::InterleaveUpper(d64, low01, low23));
  v[2] = hn::BitCast(d, hn::InterleaveLower(d64, high01, high23));
  v[3] = hn::BitCast(d, hn::InterleaveUpper(d64, high01, high23));
}
#endif

}  // namespace tile_detail

// to[r * to_stride + c] = from[r * row_stride + c * column_stride] for r < rows, c < columns.
template <typename T>
void load_tile(const T* from, std::int64_t row_stride, std::int64_t column_stride, std::int64_t rows,
               std::int64_t columns, float* to, std::int64_t to_stride) {
  namespace hn = hwy::HWY_NAMESPACE;
  if (column_stride == 1) {
    const hn::ScalableTag<float> d;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    for (std::int64_t r = 0; r < rows; ++r, from += row_stride, to += to_stride) {
      std::int64_t c = 0;
      for (; c + lanes <= columns; c += lanes) hn::StoreU(load_f32(d, from + c), d, to + c);
      for (; c < columns; ++c) to[c] = static_cast<float>(from[c]);
    }
    return;
  }
  if (row_stride == -1 && rows > 0) {  // the same copy from the last row to the first
    from -= rows - 1;
    row_stride = 1;
    to += (rows - 1) * to_stride;
    to_stride = -to_stride;
  }
  std::int64_t r = 0;
#if HWY_TARGET != HWY_SCALAR
  if (row_stride == 1) {
    const hn::FixedTag<float, 4> d;
    for (; r + 4 <= rows; r += 4) {
      std::int64_t c = 0;
      for (; c + 4 <= columns; c += 4) {
        const T* block = from + r + c * column_stride;
        hn::Vec<decltype(d)> v[4] = {load_f32(d, block), load_f32(d, block + column_stride),
                                     load_f32(d, block + 2 * column_stride),
                                     load_f32(d, block + 3 * column_stride)};
        tile_detail::transpose_4x4(d, v);
        for (int i = 0; i < 4; ++i) hn::StoreU(v[i], d, to + (r + i) * to_stride + c);
      }
      for (; c < columns; ++c)
        for (int i = 0; i < 4; ++i)
          to[(r + i) * to_stride + c] = static_cast<float>(from[r + i + c * column_stride]);
    }
  }
#endif
  for (; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c)
      to[r * to_stride + c] = static_cast<float>(from[r * row_stride + c * column_stride]);
}

// to[r * row_stride + c * column_stride] = from[r * from_stride + c], rounded to nearest even.
template <typename T>
void store_tile(const float* from, std::int64_t from_stride, T* to, std::int64_t row_stride,
                std::int64_t column_stride, std::int64_t rows, std::int64_t columns) {
  namespace hn = hwy::HWY_NAMESPACE;
  if (column_stride == 1) {
    const hn::ScalableTag<float> d;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    for (std::int64_t r = 0; r < rows; ++r, from += from_stride, to += row_stride) {
      std::int64_t c = 0;
      for (; c + lanes <= columns; c += lanes) store_f32(d, hn::LoadU(d, from + c), to + c);
      for (; c < columns; ++c) to[c] = T(from[c]);
    }
    return;
  }
  if (row_stride == -1 && rows > 0) {
    to -= rows - 1;
    row_stride = 1;
    from += (rows - 1) * from_stride;
    from_stride = -from_stride;
  }
  std::int64_t r = 0;
#if HWY_TARGET != HWY_SCALAR
  if (row_stride == 1) {
    const hn::FixedTag<float, 4> d;
    for (; r + 4 <= rows; r += 4) {
      std::int64_t c = 0;
      for (; c + 4 <= columns; c += 4) {
        const float* block = from + r * from_stride + c;
        hn::Vec<decltype(d)> v[4] = {hn::LoadU(d, block), hn::LoadU(d, block + from_stride),
                                     hn::LoadU(d, block + 2 * from_stride),
                                     hn::LoadU(d, block + 3 * from_stride)};
        tile_detail::transpose_4x4(d, v);
        for (int i = 0; i < 4; ++i) store_f32(d, v[i], to + r + (c + i) * column_stride);
      }
      for (; c < columns; ++c)
        for (int i = 0; i < 4; ++i) to[r + i + c * column_stride] = T(from[(r + i) * from_stride + c]);
    }
  }
#endif
  for (; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c)
      to[r * row_stride + c * column_stride] = T(from[r * from_stride + c]);
}

// Asks for the cache lines of a tile with elements of `size` bytes: into the second-level cache, which has
// room for the next tile while the present one fills the first. Tiles whose rows and columns are both
// strided are left alone.
inline void prefetch_tile(const void* data, std::int64_t offset, std::int64_t row_stride,
                          std::int64_t column_stride, std::int64_t rows, std::int64_t columns,
                          std::int64_t size) {
  constexpr std::int64_t kLine = 64;
  if (column_stride != 1) {
    if (row_stride != 1 && row_stride != -1) return;
    if (row_stride == -1) offset -= rows - 1;
    std::swap(rows, columns);
    row_stride = column_stride;
  }
  const char* row = static_cast<const char*>(data) + offset * size;
  for (std::int64_t r = 0; r < rows; ++r, row += row_stride * size) {
    const char* line = row;
    for (; line < row + columns * size; line += kLine) __builtin_prefetch(line, 0, 2);
  }
  // GCC takes a function that only prefetches for one without effects, and leaves out the calls to it.
  asm volatile("");
}

// The same for a type known at run time (f32, bf16 or f16); `offset` is in elements.
inline void load_tile(DType dtype, const void* data, std::int64_t offset, std::int64_t row_stride,
                      std::int64_t column_stride, std::int64_t rows, std::int64_t columns, float* to,
                      std::int64_t to_stride) {
  const auto load = [&](const auto* from) {
    load_tile(from + offset, row_stride, column_stride, rows, columns, to, to_stride);
  };
  if (dtype == DType::bf16)
    load(static_cast<const bf16*>(data));
  else if (dtype == DType::f16)
    load(static_cast<const f16*>(data));
  else
    load(static_cast<const float*>(data));
}

inline void store_tile(const float* from, std::int64_t from_stride, DType dtype, void* data,
                       std::int64_t offset, std::int64_t row_stride, std::int64_t column_stride,
                       std::int64_t rows, std::int64_t columns) {
  const auto store = [&](auto* to) {
    store_tile(from, from_stride, to + offset, row_stride, column_stride, rows, columns);
  };
  if (dtype == DType::bf16)
    store(static_cast<bf16*>(data));
  else if (dtype == DType::f16)
    store(static_cast<f16*>(data));
  else
    store(static_cast<float*>(data));
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_CORE_SIMD_TILE_INL_H_
