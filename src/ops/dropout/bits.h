// Random bits by place: 16 for each element, eight elements to a Philox block.
#pragma once

#include <cstdint>

#include "krait/core/context.h"

namespace krait::dropout_detail {

inline constexpr std::int64_t kElementsPerBlock = 8;
// What a kernel may write beyond the blocks that it was asked for.
inline constexpr std::int64_t kMaxOverrun = 512;

// bits[8 i .. 8 i + 7]: the words of philox4x32({block + i, stream}, seed), the lower half of each first, for
// i in [0, blocks). `bits` has room for kMaxOverrun more.
void random_bits(std::uint64_t seed, std::uint64_t stream, std::uint64_t block, std::int64_t blocks,
                 std::uint16_t* bits);

// Which elements are dropped, and what the others are multiplied by.
struct Rule {
  std::uint64_t seed;
  std::uint64_t stream;
  std::uint64_t offset;
  std::uint32_t dropped;  // of 65536
  double scale;
};

// On a GPU: x and out contiguous and of one dtype, f32, bf16 or f16.
void cuda(Context& ctx, const Rule& rule, const Tensor& x, const Tensor& out);

}  // namespace krait::dropout_detail
