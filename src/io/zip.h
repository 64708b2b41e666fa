// The zip archives that torch.save writes (PKWARE's APPNOTE 6.3): every entry stored, not compressed.
//
// Zip describes each entry twice and lets archives carry bytes that belong to none, so that two
// readers can see two different archives in one file. This reader takes only files in which every byte
// has one meaning: entries in a row from the first byte, then one central directory that agrees with
// them, then the end records.
#pragma once

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <string_view>

namespace krait::io {

class ZipArchive {
 public:
  using Entries = std::map<std::string_view, std::span<const std::byte>>;

  // Views of `bytes`, which must outlive the archive. Throws Error(invalid_argument), each message
  // beginning with `file`. Checksums are not compared: torch.save may leave them out, and they would
  // cost reading the whole file.
  ZipArchive(std::span<const std::byte> bytes, const std::string& file);

  [[nodiscard]] const Entries& entries() const { return entries_; }
  // Null where there is none of that name.
  [[nodiscard]] const std::span<const std::byte>* find(std::string_view name) const;

 private:
  Entries entries_;
};

}  // namespace krait::io
