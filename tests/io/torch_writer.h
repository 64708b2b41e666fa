// Writes what torch.save writes, and every way of getting it wrong.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io/raw.h"
#include "krait/core/error.h"

namespace krait::io {

// One entry, and what its two headers say where that differs from the truth.
struct ZipEntry {
  std::string name;
  std::string data;
  std::uint16_t flags = 0x0808;  // sizes after the data, UTF-8 names: torch's
  std::uint16_t method = 0;
  std::optional<std::string> local_name;
  std::optional<std::uint64_t> central_size;
  std::optional<std::uint32_t> descriptor_size;
  std::optional<std::uint32_t> central_offset;
  bool wide = false;  // sizes and offset in zip64 extra fields
};

struct ZipOptions {
  bool zip64_end = true;  // as torch writes always
  std::size_t alignment = 64;
  std::optional<std::uint64_t> count;
  std::optional<std::uint64_t> directory_offset;
  std::string gap;      // between the entries and the directory
  std::string comment;  // of the archive
};

inline std::string zip_of(const std::vector<ZipEntry>& entries, const ZipOptions& options = {}) {
  using U16 = std::uint16_t;
  using U32 = std::uint32_t;
  using U64 = std::uint64_t;
  const auto u16 = [](U64 value) { return raw(static_cast<U16>(value)); };
  const auto u32 = [](U64 value) { return raw(static_cast<U32>(value)); };
  const auto u64 = [](U64 value) { return raw(value); };
  std::string out;
  std::string directory;
  for (const ZipEntry& entry : entries) {
    const U64 offset = entry.central_offset.value_or(static_cast<U32>(out.size()));
    const U64 size = entry.central_size.value_or(entry.data.size());
    const bool later = (entry.flags & 8) != 0;
    const std::string& local_name = entry.local_name ? *entry.local_name : entry.name;
    std::string extra;
    if (entry.wide && !later) extra = u16(1) + u16(16) + u64(entry.data.size()) + u64(entry.data.size());
    if (options.alignment != 0) {
      const std::size_t start = out.size() + 30 + local_name.size() + extra.size() + 4;
      const std::size_t padding = (options.alignment - start % options.alignment) % options.alignment;
      extra += "FB" + u16(padding) + std::string(padding, 'Z');
    }
    const U64 local_size = later ? 0 : entry.wide ? 0xffffffff : entry.data.size();
    out += u32(0x04034b50) + u16(0) + u16(entry.flags) + u16(entry.method) + u32(0) + u32(0) +
           u32(local_size) + u32(local_size) + u16(local_name.size()) + u16(extra.size()) + local_name +
           extra + entry.data;
    if (later) {
      const U64 told = entry.descriptor_size.value_or(static_cast<U32>(entry.data.size()));
      out += u32(0x08074b50) + u32(0) + (entry.wide ? u64(told) + u64(told) : u32(told) + u32(told));
    }
    const std::string wide = entry.wide ? u16(1) + u16(24) + u64(size) + u64(size) + u64(offset) : "";
    const U64 mask = entry.wide ? 0xffffffff : 0;
    directory += u32(0x02014b50) + u16(0) + u16(0) + u16(entry.flags) + u16(entry.method) + u32(0) + u32(0) +
                 u32(size | mask) + u32(size | mask) + u16(entry.name.size()) + u16(wide.size()) + u16(0) +
                 u16(0) + u16(0) + u32(0) + u32(offset | mask) + entry.name + wide;
  }
  out += options.gap;
  const U64 count = options.count.value_or(entries.size());
  const U64 at = options.directory_offset.value_or(out.size());
  out += directory;
  if (options.zip64_end) {
    const U64 end64 = out.size();
    out += u32(0x06064b50) + u64(44) + u16(0) + u16(0) + u32(0) + u32(0) + u64(count) + u64(count) +
           u64(directory.size()) + u64(at);
    out += u32(0x07064b50) + u32(0) + u64(end64) + u32(1);
  }
  return out + u32(0x06054b50) + u16(0) + u16(0) + u16(count) + u16(count) + u32(directory.size()) + u32(at) +
         u16(options.comment.size()) + options.comment;
}

// Opcodes of a pickle, each appended as text.
namespace pickled {

inline std::string text(std::string_view value) {
  return "X" + raw(static_cast<std::uint32_t>(value.size())) + std::string(value);
}
inline std::string integer(std::int64_t value) { return std::string("\x8a\x08", 2) + raw(value); }
inline std::string global(std::string_view module, std::string_view name) {
  return concat("c", module, "\n", name, "\n");
}
inline std::string tuple(const std::vector<std::string>& items) {
  std::string out = "(";
  for (const auto& item : items) out += item;
  return out + "t";
}
inline std::string integers(const std::vector<std::int64_t>& values) {
  std::vector<std::string> items;
  for (const auto value : values) items.push_back(integer(value));
  return tuple(items);
}
inline std::string call(const std::string& callee, const std::vector<std::string>& arguments) {
  return callee + tuple(arguments) + "R";
}
inline std::string program(const std::string& value) { return "\x80\x02" + value + "."; }

// A dict of name and value, as pickled values.
inline std::string dict(const std::vector<std::pair<std::string, std::string>>& items) {
  std::string out = "}(";
  for (const auto& [key, value] : items) out += text(key) + value;
  return out + "u";
}

struct TensorSpec {
  std::string type = "FloatStorage";
  std::string key = "0";
  std::int64_t count = 6;
  std::int64_t offset = 0;
  std::vector<std::int64_t> shape = {2, 3};
  std::vector<std::int64_t> strides = {3, 1};
  std::string module = "torch";
};

inline std::string storage(const TensorSpec& spec) {
  return tuple({text("storage"), global(spec.module, spec.type), text(spec.key), text("cuda:0"),
                integer(spec.count)}) +
         "Q";
}
inline std::string no_hooks() { return call(global("collections", "OrderedDict"), {}); }
inline std::string tensor(const TensorSpec& spec) {
  return call(global("torch._utils", "_rebuild_tensor_v2"),
              {storage(spec), integer(spec.offset), integers(spec.shape), integers(spec.strides), "\x89",
               no_hooks()});
}

}  // namespace pickled

// The entries of a file whose pickle is `pickle` and whose storages are `storages`, by key "0", "1", ...
inline std::vector<ZipEntry> torch_entries(const std::string& pickle,
                                           const std::vector<std::string>& storages) {
  std::vector<ZipEntry> entries{{.name = "archive/data.pkl", .data = pickle},
                                {.name = "archive/byteorder", .data = "little"}};
  for (std::size_t i = 0; i < storages.size(); ++i)
    entries.push_back({.name = concat("archive/data/", i), .data = storages[i]});
  entries.push_back({.name = "archive/version", .data = "3\n"});
  entries.push_back({.name = "archive/.data/serialization_id", .data = "0123"});
  return entries;
}

}  // namespace krait::io
