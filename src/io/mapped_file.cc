#include "krait/io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/system_error.h"

namespace krait::io {
namespace {

namespace fs = std::filesystem;

// Closes a descriptor at the end of a scope; the mapping outlives it.
struct Descriptor {
  int value;
  explicit Descriptor(int descriptor) : value(descriptor) {}
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
};

}  // namespace

std::shared_ptr<MappedFile> MappedFile::open(const fs::path& path) {
  // Without O_NONBLOCK a pipe would keep us waiting for its writer.
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.value < 0) {
    const int error = errno;
    std::error_code ignored;
    if (error == ENOENT && fs::is_symlink(fs::symlink_status(path, ignored)))
      fail(ErrorKind::not_found, path.string(), ": a symbolic link to a file that does not exist");
    fail_errno(error, path, "cannot be opened");
  }
  struct stat status {};
  if (::fstat(file.value, &status) != 0) fail_errno(errno, path, "cannot be examined");
  require(!S_ISDIR(status.st_mode), path.string(), ": is a directory, expected a file");
  require(S_ISREG(status.st_mode), path.string(), ": is a device or pipe, expected a regular file");
  const auto size = static_cast<std::size_t>(status.st_size);
  std::span<const std::byte> bytes;
  if (size != 0) {  // a mapping of length 0 is refused by the system
    const void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.value, 0);
    if (data == MAP_FAILED) fail_errno(errno, path, "cannot be mapped");
    bytes = {static_cast<const std::byte*>(data), size};
  }
  return std::shared_ptr<MappedFile>(new MappedFile(path, bytes));
}

MappedFile::MappedFile(fs::path path, std::span<const std::byte> bytes)
    : path_(std::move(path)), bytes_(bytes) {}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

void MappedFile::advise_willneed() const {
  // Only a hint: whether the system takes it changes no result.
  if (!bytes_.empty()) ::madvise(const_cast<std::byte*>(bytes_.data()), bytes_.size(), MADV_WILLNEED);
}

std::string read_file(const fs::path& path, std::size_t most) {
  const auto file = MappedFile::open(path);
  const std::string_view text = file->text();
  require(text.size() <= most, path.string(), ": ", text.size(), " bytes, expected at most ", most);
  return std::string(text);
}

}  // namespace krait::io
