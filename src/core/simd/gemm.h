// The parts of the block product (gemm-inl.h) that do not depend on the SIMD target.
#pragma once

#include <algorithm>
#include <cstdint>

namespace krait {

// A matrix of T in memory: element (i, j) is data[i * row_stride + j * column_stride]. A transposed
// view costs nothing: swap the strides.
template <typename T>
struct Strided {
  T* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 1;
};

namespace gemm_limits {
// The largest tile and block sizes over all SIMD targets.
inline constexpr std::int64_t kMaxTileRows = 14;
inline constexpr std::int64_t kMaxTileColumns = 32;
inline constexpr std::int64_t kRows = 168;     // of A packed at a time: a multiple of every tile height
inline constexpr std::int64_t kColumns = 768;  // of B packed at a time: a multiple of every tile width
inline constexpr std::int64_t kDepth = 256;    // of the shared dimension packed at a time
}  // namespace gemm_limits

// Floats of workspace that gemm(m, n, k) needs, aligned to 64 bytes, for any SIMD target.
[[nodiscard]] inline std::int64_t gemm_workspace(std::int64_t m, std::int64_t n, std::int64_t k) {
  namespace g = gemm_limits;
  const std::int64_t rows = std::min(m + g::kMaxTileRows, g::kRows);
  const std::int64_t columns = std::min(n + g::kMaxTileColumns, g::kColumns);
  const std::int64_t depth = std::min(k, g::kDepth);
  const std::int64_t packed_a = (rows * depth + 15) / 16 * 16;
  const std::int64_t packed_b = (columns * depth + 15) / 16 * 16;
  return packed_a + packed_b + 16;
}

}  // namespace krait
