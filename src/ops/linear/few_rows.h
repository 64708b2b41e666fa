// How few_rows (cuda/few_rows.cuh) divides a product among blocks.
#pragma once

#include <cstdint>

namespace krait::linear_detail {

inline constexpr int kFewRowsWarps = 8;
inline constexpr int kFewRowsStep =
    32;  // elements along `in` that a warp takes at a time, of 8 rows of weights
inline constexpr int kFewRowsMost = 16;  // rows of x
inline constexpr int kFewRowsThreads = 32 * kFewRowsWarps;

struct FewRowsPlan {
  int blocks = 0;    // each with its share of the rows of weights, equal but for one
  int tiles = 0;     // of 8 rows of weights that a warp takes at once: 1, 2 or 4; 0: not for this kernel
  int steps = 0;     // along `in`, of each warp
  int x_stride = 0;  // elements between rows of x in shared memory
  int slots = 0;     // 16 bytes of weights that each thread has on their way
  std::int64_t shared = 0;  // bytes

  [[nodiscard]] std::int64_t padded_in() const { return std::int64_t{kFewRowsWarps} * steps * kFewRowsStep; }
};
[[nodiscard]] FewRowsPlan choose_few_rows_plan(std::int64_t rows, std::int64_t in, std::int64_t out,
                                               int multiprocessors, std::int64_t shared_memory);

}  // namespace krait::linear_detail
