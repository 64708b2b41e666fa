// A blob on its way in: blobs/<etag>.incomplete, which grows at its end only and is summed as it
// grows. What an earlier run left is the beginning.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "io/hub/checksum.h"

namespace krait::hub {

class PartialBlob {
 public:
  // `size` bytes are expected in all. A file that is longer already is begun anew.
  PartialBlob(std::filesystem::path path, std::string etag, std::uint64_t size);
  ~PartialBlob();  // the file stays
  PartialBlob(const PartialBlob&) = delete;
  PartialBlob& operator=(const PartialBlob&) = delete;

  [[nodiscard]] std::uint64_t size() const { return size_; }
  [[nodiscard]] bool complete() const { return size_ == expected_size_; }

  // Throws Error(io) on a full disk.
  void append(std::span<const char> bytes);
  // Drops all that has come.
  void restart();

  enum class Verdict { right, wrong, unknown };  // unknown: the etag is no checksum
  [[nodiscard]] Verdict verdict();

  // Flushes to disk and renames to `target`.
  void commit(const std::filesystem::path& target);
  void discard();

 private:
  void read_what_is_there();

  std::filesystem::path path_;
  std::string etag_;
  std::uint64_t expected_size_;
  std::uint64_t size_ = 0;
  Checksum checksum_;
  int descriptor_ = -1;
};

}  // namespace krait::hub
