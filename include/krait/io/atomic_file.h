// AtomicFile: writing a file so that nobody ever sees half of it. The bytes go to a temporary file
// beside the target; commit() flushes it to disk and renames it over the target. Until then, and
// after any failure, a target that existed before is untouched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>

namespace krait::io {

class AtomicFile {
 public:
  // Creates the temporary file. Throws Error(not_found) where the directory does not exist,
  // Error(invalid_argument) where the target exists and is not a regular file or a link to one (a
  // link is replaced by the new file, what it points to stays), Error(io) where the system refuses.
  explicit AtomicFile(std::filesystem::path target);
  // Removes the temporary file unless it was committed.
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  // Appends. Not buffered: hand over large pieces. Throws Error(io) on a full disk or any other
  // failure, after which only destruction is left.
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  // Replaces bytes that were written before: for headers that count what follows them.
  void overwrite(std::uint64_t position, std::span<const std::byte> bytes);

  // Flushes to disk and takes the target's place, with the permissions of the file that it replaces.
  // At most once, and nothing can be written afterwards.
  void commit();

  [[nodiscard]] const std::filesystem::path& path() const { return target_; }

 private:
  [[noreturn]] void fail_with(int error, std::string_view action) const;

  std::filesystem::path target_;
  std::filesystem::path temporary_;
  int descriptor_ = -1;
};

// Writes `text` as the whole content of `path`, by AtomicFile.
void write_file(const std::filesystem::path& path, std::string_view text);

}  // namespace krait::io
