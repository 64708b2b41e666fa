// Numbers of the zip format (APPNOTE.TXT of PKWARE) that reading and writing share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace krait::io::zip {

inline constexpr std::uint32_t kLocalMagic = 0x04034b50;
inline constexpr std::uint32_t kDescriptorMagic = 0x08074b50;
inline constexpr std::uint32_t kCentralMagic = 0x02014b50;
inline constexpr std::uint32_t kEndMagic = 0x06054b50;
inline constexpr std::uint32_t kEnd64Magic = 0x06064b50;
inline constexpr std::uint32_t kLocator64Magic = 0x07064b50;

// Bytes of records, without names, extra fields and comments.
inline constexpr std::size_t kLocalSize = 30;
inline constexpr std::size_t kCentralSize = 46;
inline constexpr std::size_t kEndSize = 22;
inline constexpr std::size_t kEnd64Size = 56;
inline constexpr std::size_t kLocator64Size = 20;

inline constexpr std::uint16_t kZip64Extra = 0x0001;
inline constexpr std::uint32_t kSeeZip64 =
    0xffffffff;  // in a field of 32 bits: the value stands in a zip64 one

}  // namespace krait::io::zip
