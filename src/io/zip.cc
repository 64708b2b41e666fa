#include "io/zip.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "io/layout.h"
#include "io/text.h"
#include "io/zip_format.h"
#include "krait/core/error.h"

namespace krait::io {
namespace {

using namespace zip;
using ByteSpan = std::span<const std::byte>;

constexpr std::uint16_t kEncryptedFlags = 0x0001 | 0x0040 | 0x2000;  // classic, strong, masked headers
constexpr std::uint16_t kDescriptorFlag = 0x0008;  // sizes follow the data instead of preceding it
constexpr std::uint16_t kStored = 0;

struct Directory {
  std::uint64_t entries;
  std::uint64_t offset;
  std::uint64_t size;
};

// One entry as the central directory has it.
struct Record {
  std::string_view name;
  std::uint16_t flags;
  std::uint32_t crc;
  std::uint64_t size;
  std::uint64_t offset;  // of the local header
};

Directory find_directory(ByteSpan bytes, const std::string& file) {
  require(bytes.size() >= kEndSize && load<std::uint32_t>(bytes, bytes.size() - kEndSize) == kEndMagic, file,
          ": does not end as a zip archive does: not written by torch.save, or cut short");
  const std::size_t end = bytes.size() - kEndSize;
  const auto disk = load<std::uint16_t>(bytes, end + 4);
  const auto directory_disk = load<std::uint16_t>(bytes, end + 6);
  const auto entries_here = load<std::uint16_t>(bytes, end + 8);
  const auto entries = load<std::uint16_t>(bytes, end + 10);
  const auto size = load<std::uint32_t>(bytes, end + 12);
  const auto offset = load<std::uint32_t>(bytes, end + 16);
  require(disk == 0 && directory_disk == 0 && entries_here == entries, file,
          ": is a part of a split zip archive, expected a whole one");
  require(load<std::uint16_t>(bytes, end + 20) == 0, file, ": ends in a zip comment, expected none");

  Directory directory{.entries = entries, .offset = offset, .size = size};
  std::size_t directory_end = end;
  if (end >= kLocator64Size + kEnd64Size &&
      load<std::uint32_t>(bytes, end - kLocator64Size) == kLocator64Magic) {
    const std::size_t locator = end - kLocator64Size;
    const std::size_t end64 = locator - kEnd64Size;
    require(load<std::uint32_t>(bytes, locator + 4) == 0 && load<std::uint32_t>(bytes, locator + 16) <= 1,
            file, ": is a part of a split zip archive, expected a whole one");
    require(load<std::uint64_t>(bytes, locator + 8) == end64 &&
                load<std::uint32_t>(bytes, end64) == kEnd64Magic &&
                load<std::uint64_t>(bytes, end64 + 4) == kEnd64Size - 12,
            file, ": has a zip64 end record that is not where its locator says");
    require(load<std::uint32_t>(bytes, end64 + 16) == 0 && load<std::uint32_t>(bytes, end64 + 20) == 0 &&
                load<std::uint64_t>(bytes, end64 + 24) == load<std::uint64_t>(bytes, end64 + 32),
            file, ": is a part of a split zip archive, expected a whole one");
    directory = {.entries = load<std::uint64_t>(bytes, end64 + 32),
                 .offset = load<std::uint64_t>(bytes, end64 + 48),
                 .size = load<std::uint64_t>(bytes, end64 + 40)};
    // The short record repeats what fits into it.
    require((entries == 0xffff || entries == directory.entries) &&
                (size == kSeeZip64 || size == directory.size) &&
                (offset == kSeeZip64 || offset == directory.offset),
            file, ": has two end records that contradict each other");
    directory_end = end64;
  }
  require(directory.offset <= directory_end && directory.size == directory_end - directory.offset, file,
          ": has a central directory of ", directory.size, " bytes at byte ", directory.offset,
          ", expected to end at byte ", directory_end);
  require(directory.entries <= directory.size / kCentralSize, file, ": claims ", directory.entries,
          " entries in a central directory of ", directory.size, " bytes");
  return directory;
}

// Replaces those of `fields` that are all ones by the 8-byte numbers of the zip64 extra field.
void apply_zip64(ByteSpan extra, std::span<std::uint64_t* const> fields, const std::string& what) {
  if (std::none_of(fields.begin(), fields.end(), [](const auto* field) { return *field == kSeeZip64; }))
    return;
  while (extra.size() >= 4) {
    const auto id = load<std::uint16_t>(extra, 0);
    const auto size = load<std::uint16_t>(extra, 2);
    extra = extra.subspan(4);
    require(size <= extra.size(), what, " has an extra field that is cut short");
    if (id == kZip64Extra) {
      std::size_t at = 0;
      for (std::uint64_t* field : fields) {
        if (*field != kSeeZip64) continue;
        require(at + 8 <= size, what, " has a zip64 extra field of ", size, " bytes, expected more");
        *field = load<std::uint64_t>(extra, at);
        at += 8;
      }
      return;
    }
    extra = extra.subspan(size);
  }
  fail(ErrorKind::invalid_argument, what, " has no zip64 extra field, expected one");
}

// Reads the record at `at` and moves `at` past it.
Record read_record(ByteSpan directory, std::size_t& at, const std::string& file) {
  const ByteSpan rest = directory.subspan(at);
  require(rest.size() >= kCentralSize && load<std::uint32_t>(rest, 0) == kCentralMagic, file,
          ": has a damaged central directory");
  const auto name_size = load<std::uint16_t>(rest, 28);
  const auto extra_size = load<std::uint16_t>(rest, 30);
  const auto comment_size = load<std::uint16_t>(rest, 32);
  const std::size_t total = kCentralSize + name_size + extra_size + comment_size;
  require(total <= rest.size(), file, ": has a damaged central directory");
  at += total;

  Record record{.name = text_of(rest.subspan(kCentralSize, name_size)),
                .flags = load<std::uint16_t>(rest, 8),
                .crc = load<std::uint32_t>(rest, 16),
                .size = load<std::uint32_t>(rest, 24),
                .offset = load<std::uint32_t>(rest, 42)};
  const std::string what = concat(file, ": entry ", printable(record.name));
  require((record.flags & kEncryptedFlags) == 0, what, " is encrypted, expected a plain one");
  const auto method = load<std::uint16_t>(rest, 10);
  require(method == kStored, what, " is compressed (method ", method,
          "), expected a stored one, as torch.save writes");
  require(load<std::uint16_t>(rest, 34) == 0, what, " is on another disk of a split archive");
  std::uint64_t compressed = load<std::uint32_t>(rest, 20);
  apply_zip64(rest.subspan(kCentralSize + name_size, extra_size),
              std::array{&record.size, &compressed, &record.offset}, what);
  require(compressed == record.size, what, " has ", compressed, " stored bytes for ", record.size);
  return record;
}

// Checks the sizes after the data of an entry that announces them there. Writers differ in whether
// they mark the descriptor and in the width of its sizes, which its length tells.
void check_descriptor(ByteSpan descriptor, const Record& record, const std::string& what) {
  const bool wide = descriptor.size() == 20 || descriptor.size() == 24;
  const bool marked = descriptor.size() == 16 || descriptor.size() == 24;
  require(wide || marked || descriptor.size() == 12, what, " is followed by ", descriptor.size(),
          " bytes, expected a data descriptor");
  const std::size_t start = marked ? 4 : 0;
  const auto number = [&](std::size_t at) -> std::uint64_t {
    return wide ? load<std::uint64_t>(descriptor, at) : load<std::uint32_t>(descriptor, at);
  };
  require((!marked || load<std::uint32_t>(descriptor, 0) == kDescriptorMagic) &&
              load<std::uint32_t>(descriptor, start) == record.crc && number(start + 4) == record.size &&
              number(start + (wide ? 12 : 8)) == record.size,
          what, " has a data descriptor that contradicts the central directory");
}

// The data of `record`, whose local header, data and descriptor must fill `bytes` exactly.
ByteSpan read_local(ByteSpan bytes, const Record& record, const std::string& what) {
  require(bytes.size() >= kLocalSize && load<std::uint32_t>(bytes, 0) == kLocalMagic, what,
          " has no local header where the central directory says");
  const auto name_size = load<std::uint16_t>(bytes, 26);
  const auto extra_size = load<std::uint16_t>(bytes, 28);
  const std::size_t start = kLocalSize + name_size + extra_size;
  require(start <= bytes.size() && record.size <= bytes.size() - start, what, " has ", record.size,
          " bytes, expected at most ", start <= bytes.size() ? bytes.size() - start : 0);
  const bool descriptor = (record.flags & kDescriptorFlag) != 0;
  std::uint64_t compressed = load<std::uint32_t>(bytes, 18);
  std::uint64_t size = load<std::uint32_t>(bytes, 22);
  // With a descriptor to come, the sizes here are zero, or already known, or all ones.
  const bool sizes_later = descriptor && (size == 0 || size == kSeeZip64) && compressed == size;
  if (!sizes_later) {
    apply_zip64(bytes.subspan(kLocalSize + name_size, extra_size), std::array{&size, &compressed}, what);
  }
  require(text_of(bytes.subspan(kLocalSize, name_size)) == record.name &&
              load<std::uint16_t>(bytes, 6) == record.flags && load<std::uint16_t>(bytes, 8) == kStored &&
              (sizes_later || (size == record.size && compressed == record.size)),
          what, " has a local header that contradicts the central directory");
  const auto after = bytes.subspan(start + static_cast<std::size_t>(record.size));
  if (descriptor)
    check_descriptor(after, record, what);
  else
    require(after.empty(), what, " is followed by ", after.size(), " bytes that belong to no entry");
  return bytes.subspan(start, static_cast<std::size_t>(record.size));
}

}  // namespace

ZipArchive::ZipArchive(ByteSpan bytes, const std::string& file) {
  const Directory directory = find_directory(bytes, file);
  const ByteSpan central = bytes.subspan(directory.offset, directory.size);
  std::vector<Record> records;
  records.reserve(directory.entries);
  std::size_t at = 0;
  for (std::uint64_t i = 0; i < directory.entries; ++i) records.push_back(read_record(central, at, file));
  require(at == central.size(), file, ": has ", central.size() - at,
          " bytes in its central directory that belong to no entry");

  std::sort(records.begin(), records.end(),
            [](const Record& a, const Record& b) { return a.offset < b.offset; });
  std::uint64_t begin = 0;
  for (std::size_t i = 0; i < records.size(); ++i) {
    const Record& record = records[i];
    const std::string what = concat(file, ": entry ", printable(record.name));
    const std::uint64_t end = i + 1 < records.size() ? records[i + 1].offset : directory.offset;
    require(record.offset == begin && end >= begin && end <= directory.offset, what, " begins at byte ",
            record.offset, ", expected ", begin, ": entries follow each other without gaps or overlap");
    const ByteSpan data = read_local(bytes.subspan(begin, end - begin), record, what);
    require(entries_.emplace(record.name, data).second, what, " is there twice");
    begin = end;
  }
  require(begin == directory.offset, file, ": has ", directory.offset - begin,
          " bytes that belong to no entry");
}

const std::span<const std::byte>* ZipArchive::find(std::string_view name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : &found->second;
}

}  // namespace krait::io
