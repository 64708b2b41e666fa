#include "io/zip_writer.h"

#include "core/crc32.h"
#include "io/layout.h"
#include "io/zip_format.h"

namespace krait::io {
namespace {

using namespace zip;

constexpr std::uint16_t kUtf8 = 0x0800;
constexpr std::uint16_t kPaddingExtra = 0x4246;  // "FB", as torch names it
constexpr std::size_t kAlignment = 64;
// 1 January 1980, the earliest date of the format: equal content gives equal bytes.
constexpr std::uint16_t kDate = 0x0021;

std::string u16(std::uint64_t value) { return raw(static_cast<std::uint16_t>(value)); }
std::string u32(std::uint64_t value) { return raw(static_cast<std::uint32_t>(value)); }
std::string u64(std::uint64_t value) { return raw(value); }
std::uint64_t narrow(std::uint64_t value) { return value < kSeeZip64 ? value : kSeeZip64; }

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
  if (entry.size >= kSeeZip64) extra = u16(kZip64Extra) + u16(16) + u64(entry.size) + u64(entry.size);
  constexpr std::size_t kPaddingHeader = 4;
  const std::size_t start = position_ + kLocalSize + name.size() + extra.size() + kPaddingHeader;
  const std::size_t padding = (kAlignment - start % kAlignment) % kAlignment;
  extra += u16(kPaddingExtra) + u16(padding) + std::string(padding, 'Z');
  write(u32(kLocalMagic) + u16(entry.size >= kSeeZip64 ? 45 : 20) + u16(kUtf8) + u16(0) + u16(0) +
        u16(kDate) + u32(entry.crc) + u32(narrow(entry.size)) + u32(narrow(entry.size)) + u16(name.size()) +
        u16(extra.size()) + name + extra);
  file_.write(data);
  position_ += data.size();
  entries_.push_back(entry);
}

void ZipWriter::finish() {
  const std::uint64_t directory = position_;
  for (const Entry& entry : entries_) {
    std::string wide;
    if (entry.size >= kSeeZip64) wide += u64(entry.size) + u64(entry.size);
    if (entry.offset >= kSeeZip64) wide += u64(entry.offset);
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
