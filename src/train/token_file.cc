#include "train/token_file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "io/layout.h"
#include "krait/core/error.h"
#include "krait/io/mapped_file.h"

namespace krait::dataset {
namespace {

constexpr std::array<char, 8> kMagic = {'K', 'R', 'A', 'I', 'T', 'T', 'O', 'K'};
constexpr std::uint32_t kVersion = 1;
constexpr std::int64_t kNoEnd = -1;

// The first 64 bytes, little-endian.
struct Header {
  std::array<char, 8> magic = kMagic;
  std::uint32_t version = kVersion;
  std::uint32_t bytes_per_token = 0;  // 2 or 4
  std::uint64_t vocab_size = 0;
  std::uint64_t tokens = 0;
  std::uint64_t documents = 0;
  std::int64_t end_of_text = kNoEnd;
  std::uint64_t index_checksum = 0;
  std::uint64_t header_checksum = 0;  // of all that stands before it
};
static_assert(sizeof(Header) == 64);

// FNV-1a (Fowler, Noll and Vo): finds damage, not malice.
std::uint64_t checksum(std::span<const std::byte> bytes) {
  std::uint64_t hash = 0xCBF29CE484222325U;
  for (const std::byte b : bytes) hash = (hash ^ std::to_integer<std::uint64_t>(b)) * 0x100000001B3U;
  return hash;
}

std::uint64_t checksum(const Header& header) {
  return checksum(std::as_bytes(std::span(&header, 1)).first(offsetof(Header, header_checksum)));
}

// The index begins at a multiple of 8.
std::uint64_t padded(std::uint64_t bytes) { return (bytes + 7) / 8 * 8; }

Header read_header(std::span<const std::byte> bytes, const std::string& name) {
  require(bytes.size() >= kMagic.size() && std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0, name,
          ": does not begin as a packed token file does (krait data pack makes them)");
  require(bytes.size() >= sizeof(Header), name, ": is cut short in its header");
  const auto header = io::load<Header>(bytes, 0);
  require(header.version == kVersion, name, ": has version ", header.version,
          " of the packed token format, expected ", kVersion);
  require(header.header_checksum == checksum(header), name, ": has a damaged header: its checksum is wrong");
  require(header.bytes_per_token == sizeof(Narrow) || header.bytes_per_token == sizeof(Wide), name, ": has ",
          header.bytes_per_token, " bytes a token, expected 2 or 4");
  require(header.vocab_size >= 1 && header.vocab_size <= std::numeric_limits<Wide>::max(), name,
          ": has a vocabulary of ", header.vocab_size);
  return header;
}

// Documents end one after the other, the last one with the tokens.
void check_index(std::span<const std::uint64_t> ends, const Header& header, const std::string& name) {
  require(checksum(std::as_bytes(ends)) == header.index_checksum, name,
          ": has a damaged index of documents: its checksum is wrong");
  std::uint64_t last = 0;
  for (const std::uint64_t end : ends) {
    require(end > last, name, ": has a damaged index of documents: ", end, " after ", last);
    last = end;
  }
  require(last == header.tokens, name, ": has an index of documents that ends at token ", last, ", expected ",
          header.tokens);
}

template <typename T>
std::span<const T> elements(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
}

}  // namespace

TokenFile parse_token_file(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
                           const std::string& name) {
  const Header header = read_header(bytes, name);
  // Counts beyond the file's own size cannot be right, and those below it do not overflow.
  const bool plausible = header.tokens <= bytes.size() && header.documents <= bytes.size();
  const std::uint64_t id_bytes = plausible ? header.tokens * header.bytes_per_token : 0;
  const std::uint64_t index = sizeof(Header) + padded(id_bytes);
  const std::uint64_t expected = index + (plausible ? header.documents * sizeof(std::uint64_t) : 0);
  require(plausible && bytes.size() == expected, name, ": has ", bytes.size(), " bytes, which does not fit ",
          header.tokens, " tokens and ", header.documents, " documents: it is cut short or damaged");
  require(header.tokens > 0, name, ": has no tokens");

  TokenFile file;
  file.vocab_size = static_cast<std::int64_t>(header.vocab_size);
  if (header.end_of_text != kNoEnd) file.end_of_text = header.end_of_text;
  const auto ids = bytes.subspan(sizeof(Header), id_bytes);
  file.part = {.name = name,
               .ids = {},
               .document_ends = elements<std::uint64_t>(bytes.subspan(index)),
               .owner = std::move(owner)};
  if (header.bytes_per_token == sizeof(Narrow))
    file.part.ids = elements<Narrow>(ids);
  else
    file.part.ids = elements<Wide>(ids);
  check_index(file.part.document_ends, header, name);
  return file;
}

TokenFile read_token_file(const std::filesystem::path& path) {
  const auto file = io::MappedFile::open(path);
  return parse_token_file(file->bytes(), file, path.string());
}

TokenFileWriter::TokenFileWriter(const std::filesystem::path& path, std::int64_t vocab_size,
                                 std::optional<std::int64_t> end_of_text)
    : file_(path), vocab_size_(vocab_size), end_of_text_(end_of_text) {
  const std::array<std::byte, sizeof(Header)> room{};  // for the header, which finish() knows
  file_.write(std::span(room));
}

template <typename Id>
void TokenFileWriter::write_as(std::span<const std::int64_t> ids) {
  std::vector<Id> narrow(ids.size());
  std::transform(ids.begin(), ids.end(), narrow.begin(), [](std::int64_t id) { return static_cast<Id>(id); });
  file_.write(std::as_bytes(std::span(narrow)));
}

void TokenFileWriter::append(std::span<const std::int64_t> ids, std::span<const std::size_t> document_ends) {
  if (vocab_size_ <= kNarrowVocabulary)
    write_as<Narrow>(ids);
  else
    write_as<Wide>(ids);
  for (const std::size_t end : document_ends) end_document_at(tokens_ + end);
  tokens_ += ids.size();
}

void TokenFileWriter::end_document_at(std::uint64_t token) {
  if (token > (document_ends_.empty() ? 0 : document_ends_.back())) document_ends_.push_back(token);
}

void TokenFileWriter::end_document() { end_document_at(tokens_); }

void TokenFileWriter::finish() {
  end_document();
  const auto index = std::as_bytes(std::span(document_ends_));
  Header header;
  header.bytes_per_token = vocab_size_ <= kNarrowVocabulary ? sizeof(Narrow) : sizeof(Wide);
  header.vocab_size = static_cast<std::uint64_t>(vocab_size_);
  header.tokens = tokens_;
  header.documents = document_ends_.size();
  header.end_of_text = end_of_text_.value_or(kNoEnd);
  header.index_checksum = checksum(index);
  header.header_checksum = checksum(header);
  const std::uint64_t id_bytes = tokens_ * header.bytes_per_token;
  const std::array<std::byte, 8> padding{};
  file_.write(std::span(padding).first(padded(id_bytes) - id_bytes));
  file_.write(index);
  file_.overwrite(0, std::as_bytes(std::span(&header, 1)));
  file_.commit();
}

}  // namespace krait::dataset
