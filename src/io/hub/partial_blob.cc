#include "io/hub/partial_blob.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <memory>

#include "io/system_error.h"

namespace krait::hub {

namespace fs = std::filesystem;

PartialBlob::PartialBlob(fs::path path, std::string etag, std::uint64_t size)
    : path_(std::move(path)), etag_(std::move(etag)), expected_size_(size), checksum_(etag_, size) {
  descriptor_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor_ < 0) io::fail_errno(errno, path_, "cannot be opened");
  try {
    read_what_is_there();
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

PartialBlob::~PartialBlob() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void PartialBlob::read_what_is_there() {
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0) io::fail_errno(errno, path_, "cannot be read");
  if (static_cast<std::uint64_t>(status.st_size) > expected_size_) {
    restart();
    return;
  }
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  const auto buffer = std::make_unique_for_overwrite<char[]>(kPiece);
  for (;;) {
    const ssize_t got = ::read(descriptor_, buffer.get(), kPiece);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) io::fail_errno(errno, path_, "cannot be read");
    if (got == 0) return;
    checksum_.update({buffer.get(), static_cast<std::size_t>(got)});
    size_ += static_cast<std::uint64_t>(got);
  }
}

void PartialBlob::append(std::span<const char> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) io::fail_errno(errno, path_, "cannot be written");
    const auto count = static_cast<std::size_t>(written);
    checksum_.update(bytes.first(count));
    size_ += count;
    bytes = bytes.subspan(count);
  }
}

void PartialBlob::restart() {
  if (::ftruncate(descriptor_, 0) != 0 || ::lseek(descriptor_, 0, SEEK_SET) != 0)
    io::fail_errno(errno, path_, "cannot be emptied");
  size_ = 0;
  checksum_ = Checksum(etag_, expected_size_);
}

PartialBlob::Verdict PartialBlob::verdict() {
  if (!checksum_.known()) return Verdict::unknown;
  return checksum_.finish() == etag_ ? Verdict::right : Verdict::wrong;
}

void PartialBlob::commit(const fs::path& target) {
  if (::fsync(descriptor_) != 0) io::fail_errno(errno, path_, "cannot be written to disk");
  if (::rename(path_.c_str(), target.c_str()) != 0) io::fail_errno(errno, target, "cannot be put in place");
}

void PartialBlob::discard() { ::unlink(path_.c_str()); }

}  // namespace krait::hub
