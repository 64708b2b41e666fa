// Random bits by place: 16 for each element, eight elements to a Philox block.
#pragma once

#include <cstdint>

namespace krait::dropout_detail {

inline constexpr std::int64_t kElementsPerBlock = 8;
// What a kernel may write beyond the blocks that it was asked for.
inline constexpr std::int64_t kMaxOverrun = 512;

// bits[8 i .. 8 i + 7]: the words of philox4x32({block + i, stream}, seed), the lower half of each first, for
// i in [0, blocks). `bits` has room for kMaxOverrun more.
void random_bits(std::uint64_t seed, std::uint64_t stream, std::uint64_t block, std::int64_t blocks,
                 std::uint16_t* bits);

}  // namespace krait::dropout_detail
