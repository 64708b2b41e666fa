// Packed token files: reading and writing. docs/training-data.md describes the bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "krait/io/atomic_file.h"
#include "train/token_stream.h"

namespace krait::dataset {

struct TokenFile {
  std::int64_t vocab_size = 0;
  std::optional<std::int64_t> end_of_text;
  StreamPart part;  // points into the file
};

// Maps the file. Checks the header and the index of documents; ids are checked as they are read. Throws
// Error, naming the file, what was found and what was expected.
[[nodiscard]] TokenFile read_token_file(const std::filesystem::path& path);
// The same of a file in memory at an address that is a multiple of 8, which `owner` keeps alive.
[[nodiscard]] TokenFile parse_token_file(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
                                         const std::string& name);

// Writes ids as they come; the file appears complete at finish() or not at all.
class TokenFileWriter {
 public:
  TokenFileWriter(const std::filesystem::path& path, std::int64_t vocab_size,
                  std::optional<std::int64_t> end_of_text);

  // Ids lie in [0, vocab_size). Documents end at `document_ends`, rising places in `ids`.
  void append(std::span<const std::int64_t> ids, std::span<const std::size_t> document_ends);
  // Ends a document here; nothing where there is nothing since the last end.
  void end_document();
  // Ends the last document.
  void finish();

  [[nodiscard]] std::int64_t tokens() const { return static_cast<std::int64_t>(tokens_); }
  [[nodiscard]] std::int64_t documents() const { return static_cast<std::int64_t>(document_ends_.size()); }

 private:
  void end_document_at(std::uint64_t token);
  template <typename Id>
  void write_as(std::span<const std::int64_t> ids);

  io::AtomicFile file_;
  std::int64_t vocab_size_;
  std::optional<std::int64_t> end_of_text_;
  std::uint64_t tokens_ = 0;
  std::vector<std::uint64_t> document_ends_;
};

}  // namespace krait::dataset
