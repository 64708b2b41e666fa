// MappedFile: a file as read-only memory. Pages are read from disk when they are first touched, so
// opening costs the same for a kilobyte and for a hundred gigabytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace krait::io {

class MappedFile {
 public:
  // Maps a regular file (symbolic links are followed; the file may be empty). Throws Error(not_found)
  // where there is none, Error(invalid_argument) for a directory, a pipe or a device, Error(io) where
  // the system refuses. The mapping is private and read-only: writing to it ends the process, and so
  // does reading pages that another process has cut off the file since. Replacing the file by another
  // (as AtomicFile does) leaves the mapping as it was.
  static std::shared_ptr<MappedFile> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // The whole file; starts at a page boundary.
  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }
  [[nodiscard]] std::string_view text() const {
    return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()};
  }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  // Tells the system to start reading the whole file now; does not wait for it.
  void advise_willneed() const;

 private:
  MappedFile(std::filesystem::path path, std::span<const std::byte> bytes);

  std::filesystem::path path_;
  std::span<const std::byte> bytes_;
};

// A copy of the whole file. Throws as MappedFile::open does, and Error(invalid_argument) where there are more
// than `most` bytes.
[[nodiscard]] std::string read_file(const std::filesystem::path& path, std::size_t most = SIZE_MAX);

}  // namespace krait::io
