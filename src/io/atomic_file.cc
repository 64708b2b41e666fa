#include "krait/io/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <random>
#include <sstream>

#include "io/system_error.h"

namespace krait::io {
namespace {

namespace fs = std::filesystem;

fs::path directory_of(const fs::path& target) {
  return target.has_parent_path() ? target.parent_path() : fs::path(".");
}

// Short, so that it fits wherever the target's name fits; hidden; different in each process and call.
std::string temporary_name() {
  std::random_device random;
  const std::uint64_t number = (std::uint64_t{random()} << 32) | random();
  std::ostringstream name;
  name << ".krait-" << std::hex << number << ".tmp";
  return name.str();
}

}  // namespace

AtomicFile::AtomicFile(fs::path target) : target_(std::move(target)) {
  require(target_.has_filename(), target_.string(), ": is a directory, expected the name of a file");
  std::error_code ignored;
  const fs::file_status status = fs::status(target_, ignored);
  require(status.type() != fs::file_type::directory, target_.string(), ": is a directory, expected a file");
  // Renaming over /dev/null would put a regular file in its place for everyone.
  require(!fs::exists(status) || fs::is_regular_file(status), target_.string(),
          ": is a device or pipe, expected a regular file or a new name");
  do {
    temporary_ = directory_of(target_) / temporary_name();
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (descriptor_ < 0 && errno == EEXIST);
  if (descriptor_ < 0) fail_with(errno, "cannot be created");
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  require(descriptor_ >= 0, target_.string(), ": written to after it was committed");
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      fail_with(errno, "cannot be written");
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::write(std::string_view text) { write(std::as_bytes(std::span(text))); }

void AtomicFile::overwrite(std::uint64_t position, std::span<const std::byte> bytes) {
  require(descriptor_ >= 0, target_.string(), ": written to after it was committed");
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(descriptor_, bytes.data(), bytes.size(), static_cast<off_t>(position));
    if (written < 0) {
      if (errno == EINTR) continue;
      fail_with(errno, "cannot be written");
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
    position += static_cast<std::uint64_t>(written);
  }
}

void AtomicFile::commit() {
  require(descriptor_ >= 0, target_.string(), ": committed twice");
  struct stat old {};
  if (::stat(target_.c_str(), &old) == 0 && ::fchmod(descriptor_, old.st_mode & 0777U) != 0)
    fail_with(errno, "cannot be given the permissions of the file that it replaces");
  if (::fsync(descriptor_) != 0) fail_with(errno, "cannot be written to disk");
  const int closed = ::close(descriptor_);
  descriptor_ = -1;
  if (closed != 0) fail_with(errno, "cannot be written to disk");
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail_with(errno, "cannot be put in place");
  temporary_.clear();
  // The new name is on disk once its directory is. Some file systems cannot flush a directory; the
  // file is complete and in place either way.
  const int directory = ::open(directory_of(target_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory >= 0) {
    ::fsync(directory);
    ::close(directory);
  }
}

void AtomicFile::fail_with(int error, std::string_view action) const { fail_errno(error, target_, action); }

void write_file(const fs::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

}  // namespace krait::io
