// CRC-32 as in zip and gzip (IEEE 802.3), eight bytes a step (Kounavis and Berry 2005, "slicing by 8").
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace krait {

// Of `bytes`, or of what `crc` is the checksum of with `bytes` behind it.
[[nodiscard]] std::uint32_t crc32(std::span<const std::byte> bytes, std::uint32_t crc = 0);

}  // namespace krait
