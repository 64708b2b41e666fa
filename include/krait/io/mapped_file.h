// MappedFile: a file as read-only memory. Pages are read from disk when they are first touched, so
// opening costs the same for a kilobyte and for a hundred gigabytes.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>

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
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  // Tells the system to start reading the whole file now; does not wait for it.
  void advise_willneed() const;

 private:
  MappedFile(std::filesystem::path path, std::span<const std::byte> bytes);

  std::filesystem::path path_;
  std::span<const std::byte> bytes_;
};

}  // namespace krait::io
