// The folder of one repository in huggingface_hub's cache. The layout is drawn in krait/io/hub.h.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "krait/io/hub.h"

namespace krait::hub {

// Holds the lock of one blob against other threads and processes, by flock as huggingface_hub does.
class FileLock {
 public:
  // Waits for the lock; throws Error(interrupted) if the caller stops meanwhile. On a file system
  // that has no locks it warns and goes on: the checksum still keeps a mixture out.
  FileLock(const std::filesystem::path& path, std::string_view wanted_for, const Options& options);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int descriptor_ = -1;
};

class Cache {
 public:
  Cache(std::filesystem::path root, const std::string& repo);

  // The commit that `revision` stands for: itself, or what refs/ says; nothing if unknown.
  [[nodiscard]] std::optional<std::string> commit_of(const std::string& revision) const;
  void write_ref(const std::string& revision, const std::string& commit) const;

  [[nodiscard]] std::filesystem::path snapshot(const std::string& commit) const;
  [[nodiscard]] bool has(const std::string& commit, std::string_view file) const;
  // Whether it was noted that the hub has no such file.
  [[nodiscard]] bool lacks(const std::string& commit, std::string_view file) const;
  void note_lack(const std::string& commit, std::string_view file) const;

  [[nodiscard]] std::filesystem::path blob(const std::string& etag) const;
  [[nodiscard]] std::filesystem::path lock(const std::string& etag) const;
  // Creates the directories that a download writes to. Throws Error(io).
  void prepare(const std::string& commit) const;
  // Makes snapshots/<commit>/<file> a relative link to the blob, in one step.
  void link(const std::string& commit, const std::string& file, const std::string& etag) const;
  // What an ordinary user may still write there, in bytes.
  [[nodiscard]] std::uint64_t free_bytes() const;

 private:
  std::filesystem::path root_;
  std::filesystem::path repo_;  // models--org--name
  std::filesystem::path locks_;
};

}  // namespace krait::hub
