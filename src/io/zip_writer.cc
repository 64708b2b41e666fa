#include "io/zip_writer.h"

#include <bit>
#include <cstring>

#include "core/crc32.h"

namespace krait::io {
namespace {

constexpr std::uint32_t kLocalMagic = 0x04034b50;
constexpr std::uint32_t kCentralMagic = 0x02014b50;
constexpr std::uint32_t kEndMagic = 0x06054b50;
constexpr std::uint32_t kEnd64Magic = 0x06064b50;
constexpr std::uint32_t kLocator64Magic = 0x07064b50;
constexpr std::uint16_t kUtf8 = 0x0800;
constexpr std::uint16_t kZip64Extra = 0x0001;
constexpr std::uint16_t kPaddingExtra = 0x4246;  // "FB", as torch names it
constexpr std::uint64_t kNarrow = 0xffffffff;    // what does not fit stands in a zip64 field
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kLocalSize = 30;
// 1 January 1980, the earliest date of the format: equal content gives equal bytes.
constexpr std::uint16_t kDate = 0x0021;

template <typename T>
std::string raw(T value) {
  static_assert(std::endian::native == std::endian::little);
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}
std::string u16(std::uint64_t value) { return raw(static_cast<std::uint16_t>(value)); }
std::string u32(std::uint64_t value) { return raw(static_cast<std::uint32_t>(value)); }
std::string u64(std::uint64_t value) { return raw(value); }
std::uint64_t narrow(std::uint64_t value) { return value < kNarrow ? value : kNarrow; }

}  // namespace

void ZipWriter::write(std::string_view bytes) {
  file_.write(bytes);
  position_ += bytes.size();
}

void ZipWriter::add(const std::string& name, std::string_view text) {
  add(name, std::as_bytes(std::span(text)));
}

void ZipWriter::add(const std::string& name, std::span<const std::byte> data) {
  const Entry entry{.name = name, .size = data.size(), .offset = position_, .crc = crc32(data)};
  std::string extra;
  if (entry.size >= kNarrow) extra = u16(kZip64Extra) + u16(16) + u64(entry.size) + u64(entry.size);
  constexpr std::size_t kPaddingHeader = 4;
  const std::size_t start = position_ + kLocalSize + name.size() + extra.size() + kPaddingHeader;
  const std::size_t padding = (kAlignment - start % kAlignment) % kAlignment;
  extra += u16(kPaddingExtra) + u16(padding) + std::string(padding, 'Z');
  write(u32(kLocalMagic) + u16(entry.size >= kNarrow ? 45 : 20) + u16(kUtf8) + u16(0) + u16(0) + u16(kDate) +
        u32(entry.crc) + u32(narrow(entry.size)) + u32(narrow(entry.size)) + u16(name.size()) +
        u16(extra.size()) + name + extra);
  file_.write(data);
  position_ += data.size();
  entries_.push_back(entry);
}

void ZipWriter::finish() {
  const std::uint64_t directory = position_;
  for (const Entry& entry : entries_) {
    std::string wide;
    if (entry.size >= kNarrow) wide += u64(entry.size) + u64(entry.size);
    if (entry.offset >= kNarrow) wide += u64(entry.offset);
    if (!wide.empty()) wide.insert(0, u16(kZip64Extra) + u16(wide.size()));
    write(u32(kCentralMagic) + u16(45) + u16(45) + u16(kUtf8) + u16(0) + u16(0) + u16(kDate) +
          u32(entry.crc) + u32(narrow(entry.size)) + u32(narrow(entry.size)) + u16(entry.name.size()) +
          u16(wide.size()) + u16(0) + u16(0) + u16(0) + u32(0) + u32(narrow(entry.offset)) + entry.name +
          wide);
  }
  const std::uint64_t size = position_ - directory;
  const std::uint64_t end64 = position_;
  // Always with the zip64 end, as torch does.
  write(u32(kEnd64Magic) + u64(44) + u16(45) + u16(45) + u32(0) + u32(0) + u64(entries_.size()) +
        u64(entries_.size()) + u64(size) + u64(directory));
  write(u32(kLocator64Magic) + u32(0) + u64(end64) + u32(1));
  const std::uint64_t count = entries_.size() < 0xffff ? entries_.size() : 0xffff;
  write(u32(kEndMagic) + u16(0) + u16(0) + u16(count) + u16(count) + u32(narrow(size)) +
        u32(narrow(directory)) + u16(0));
}

}  // namespace krait::io
