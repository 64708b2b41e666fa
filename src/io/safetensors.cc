#include "krait/io/safetensors.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "io/json.h"
#include "io/layout.h"
#include "io/text.h"
#include "krait/core/error.h"
#include "krait/io/atomic_file.h"
#include "krait/io/mapped_file.h"

namespace krait::io {
namespace {

using nlohmann::json;

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeader = 100'000'000;  // the format's own limit
constexpr int kMaxDepth = 3;                       // file, tensor, shape
constexpr std::size_t kAlignment = 64;
constexpr std::string_view kMetadataKey = "__metadata__";

constexpr std::array<std::pair<std::string_view, DType>, 11> kTypes{{{"F64", DType::f64},
                                                                     {"F32", DType::f32},
                                                                     {"F16", DType::f16},
                                                                     {"BF16", DType::bf16},
                                                                     {"I64", DType::i64},
                                                                     {"I32", DType::i32},
                                                                     {"I16", DType::i16},
                                                                     {"I8", DType::i8},
                                                                     {"U8", DType::u8},
                                                                     {"BOOL", DType::boolean},
                                                                     {"C64", DType::c64}}};

// What the header says of one tensor; `begin` and `end` are bytes after the header.
struct Entry {
  std::string name;
  std::string what;
  DType dtype;
  Dims shape;
  std::uint64_t begin;
  std::uint64_t end;
};

DType dtype_from(const json& value, const std::string& what) {
  require(value.is_string(), what, " has a dtype that is not text");
  const auto& text = value.get_ref<const std::string&>();
  const auto* found = std::find_if(kTypes.begin(), kTypes.end(), [&](auto& t) { return t.first == text; });
  require(found != kTypes.end(), what, " has dtype ", printable(text),
          ", expected F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL or C64");
  return found->second;
}

// A list of non-negative whole numbers below 2^63.
std::vector<std::int64_t> integers_from(const json& value, const char* field, const std::string& what) {
  require(value.is_array(), what, " has a ", field, " that is not a list");
  std::vector<std::int64_t> numbers;
  for (const json& item : value) {
    require(item.is_number_unsigned() && item.get<std::uint64_t>() >> 63 == 0, what, " has a ", field,
            " with an item that is not a whole number from 0 to 2^63 - 1");
    numbers.push_back(item.get<std::int64_t>());
  }
  return numbers;
}

Entry entry_from(const std::string& name, const json& value, const std::string& file) {
  const std::string what = concat(file, ": tensor ", printable(name));
  require(value.is_object() && value.size() == 3 && value.contains("dtype") && value.contains("shape") &&
              value.contains("data_offsets"),
          what, " is not described by exactly dtype, shape and data_offsets");
  const DType dtype = dtype_from(value["dtype"], what);
  const Dims shape = checked_dims(integers_from(value["shape"], "shape", what), what);
  const auto offsets = integers_from(value["data_offsets"], "data_offsets", what);
  require(offsets.size() == 2 && offsets[0] <= offsets[1], what,
          " has data_offsets that are not a begin and an end");
  const auto begin = static_cast<std::uint64_t>(offsets[0]);
  const auto end = static_cast<std::uint64_t>(offsets[1]);
  const std::size_t expected = checked_nbytes(shape, dtype, what);
  require(end - begin == expected, what, " takes ", end - begin, " bytes, expected ", expected, " for shape ",
          shape, " of ", dtype);
  return {.name = name, .what = what, .dtype = dtype, .shape = shape, .begin = begin, .end = end};
}

Metadata metadata_from(const json& value, const std::string& file) {
  require(value.is_object(), file, ": ", kMetadataKey, " is not an object");
  Metadata metadata;
  for (const auto& [key, text] : value.items()) {
    require(text.is_string(), file, ": ", kMetadataKey, " has a value for ", printable(key),
            " that is not text");
    metadata.emplace(key, text.get<std::string>());
  }
  return metadata;
}

// Each byte of the data belongs to exactly one tensor.
void require_tiling(std::vector<Entry>& entries, std::uint64_t size, const std::string& file) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::uint64_t covered = 0;
  for (const Entry& entry : entries) {
    require(entry.end <= size, entry.what, " ends at byte ", entry.end, " of the data, which has ", size);
    require(entry.begin == covered, entry.what, " begins at byte ", entry.begin, " of the data, expected ",
            covered, ": tensors follow each other without ", entry.begin < covered ? "overlap" : "gaps");
    covered = entry.end;
  }
  require(covered == size, file, ": has ", size, " bytes of data, expected ", covered);
}

std::string_view name_in_file(DType dtype, const std::string& what) {
  const auto* found = std::find_if(kTypes.begin(), kTypes.end(), [&](auto& t) { return t.second == dtype; });
  require(found != kTypes.end(), what, " has dtype ", dtype, ", which safetensors does not have");
  return found->first;
}

// JSON text of a string; throws where it is not UTF-8.
std::string json_text(const std::string& text, const std::string& what) {
  try {
    return json(text).dump();
  } catch (const json::exception&) {
    fail(ErrorKind::invalid_argument, what, " is not valid UTF-8");
  }
}

}  // namespace

TensorMap parse_safetensors(std::span<const std::byte> bytes, std::shared_ptr<void> owner,
                            const std::string& name, Metadata* metadata) {
  require(bytes.size() >= kLengthBytes, name, ": has ", bytes.size(),
          " bytes, expected a safetensors file, which begins with the 8-byte length of its header");
  const auto length = load<std::uint64_t>(bytes, 0);
  require(length <= kMaxHeader && length <= bytes.size() - kLengthBytes, name, ": claims a header of ",
          length, " bytes, expected at most ",
          std::min<std::uint64_t>(kMaxHeader, bytes.size() - kLengthBytes),
          ": not a safetensors file, or cut short");
  const auto header_bytes = bytes.subspan(kLengthBytes, static_cast<std::size_t>(length));
  const auto data = bytes.subspan(kLengthBytes + header_bytes.size());
  const json header = parse_json(text_of(header_bytes), kMaxDepth, name + ": the header");
  require(header.is_object(), name, ": the header is not a JSON object");

  std::vector<Entry> entries;
  Metadata found;
  for (const auto& [key, value] : header.items()) {
    if (key == kMetadataKey)
      found = metadata_from(value, name);
    else
      entries.push_back(entry_from(key, value, name));
  }
  require_tiling(entries, data.size(), name);
  TensorMap tensors;
  for (const Entry& entry : entries) {
    const Bytes own{.data = data.subspan(entry.begin, entry.end - entry.begin), .owner = owner};
    tensors.emplace(entry.name, view_of(usable_as(own, entry.dtype, entry.what), entry.shape,
                                        contiguous_strides(entry.shape), entry.dtype));
  }
  if (metadata != nullptr) *metadata = std::move(found);
  return tensors;
}

TensorMap read_safetensors(const std::filesystem::path& path, Metadata* metadata) {
  const auto file = MappedFile::open(path);
  return parse_safetensors(file->bytes(), file, path.string(), metadata);
}

void write_safetensors(const std::filesystem::path& path, const TensorMap& tensors,
                       const Metadata& metadata) {
  // Larger elements first: then each is aligned to its own size without gaps, which the format forbids.
  std::vector<const TensorMap::value_type*> order;
  for (const auto& item : tensors) {
    const std::string what = concat(path.string(), ": tensor ", printable(item.first));
    require(item.first != kMetadataKey, what, ": this name is reserved");
    require_writable(item.second, what);
    order.push_back(&item);
  }
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return size_of(a->second.dtype()) > size_of(b->second.dtype());
  });

  std::string header = "{";
  const char* separator = "";
  if (!metadata.empty()) {
    header += concat('"', kMetadataKey, "\":{");
    for (const auto& [key, value] : metadata) {
      const std::string what = concat(path.string(), ": metadata ", printable(key));
      header += concat(separator, json_text(key, what), ':', json_text(value, what));
      separator = ",";
    }
    header += '}';
  }
  std::size_t at = 0;
  for (const auto* item : order) {
    const auto& [name, tensor] = *item;
    const std::string what = concat(path.string(), ": tensor ", printable(name));
    header += concat(separator, json_text(name, what), ":{\"dtype\":\"", name_in_file(tensor.dtype(), what),
                     "\",\"shape\":", json(std::vector(tensor.shape().begin(), tensor.shape().end())).dump(),
                     ",\"data_offsets\":[", at, ',', at + tensor.nbytes(), "]}");
    separator = ",";
    at += tensor.nbytes();
  }
  header += '}';
  // The format lets a header end in spaces.
  header.append((kAlignment - (kLengthBytes + header.size()) % kAlignment) % kAlignment, ' ');
  require(header.size() <= kMaxHeader, path.string(), ": needs a header of ", header.size(),
          " bytes, expected at most ", kMaxHeader);

  AtomicFile file(path);
  const std::uint64_t length = header.size();
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(header);
  for (const auto* item : order) file.write(bytes_of(item->second.contiguous()));
  file.commit();
}

}  // namespace krait::io
