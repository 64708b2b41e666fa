#include "train/run_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <utility>

#include "io/system_error.h"
#include "krait/io/atomic_file.h"

namespace krait {
namespace fs = std::filesystem;
namespace {

constexpr const char* kLock = ".lock";

// AtomicFile's, of a process that was killed.
bool is_temporary(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.starts_with(".krait-") && name.ends_with(".tmp");
}

// What a run leaves that was killed before it had written its settings counts as nothing.
bool is_as_good_as_empty(const fs::path& path) {
  for (const auto& entry : fs::directory_iterator(path))
    if (entry.path().filename() != kLock && !is_temporary(entry.path())) return false;
  return true;
}

}  // namespace

RunDirectory::RunDirectory(fs::path path, bool resume) : path_(std::move(path)) {
  std::error_code error;
  created_ = fs::create_directories(path_, error);
  if (error) io::fail_errno(error.value(), path_, "cannot be created");
  require(fs::is_directory(path_), path_.string(), ": is a file, expected a directory");
  try {
    lock();
    const bool empty = is_as_good_as_empty(path_);
    require(empty || resume, path_.string(), ": is not empty, expected a new directory for the run",
            fs::exists(path_ / "settings.json") ? " (--resume goes on with the run that is there)" : "");
    require(empty || holds_run(), path_.string(),
            ": holds files but no run (no settings.json), expected a run to resume or a new directory");
    clean_up();
  } catch (...) {
    unlock();
    throw;
  }
}

RunDirectory::~RunDirectory() { unlock(); }

bool RunDirectory::holds_run() const { return fs::exists(path_ / "settings.json"); }

void RunDirectory::lock() {
  const fs::path name = path_ / kLock;
  for (;;) {
    descriptor_ = ::open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (descriptor_ < 0) io::fail_errno(errno, name, "cannot be opened");
    if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
      const int reason = errno;
      ::close(descriptor_);
      descriptor_ = -1;
      if (reason == EINTR) continue;
      require(reason != EWOULDBLOCK, path_.string(), ": is in use by another run");
      io::fail_errno(reason, name, "cannot be locked");
    }
    // Between open and lock the run before may have ended and taken the name away.
    struct stat held {};
    struct stat named {};
    if (::fstat(descriptor_, &held) == 0 && ::stat(name.c_str(), &named) == 0 && held.st_ino == named.st_ino)
      return;
    ::close(descriptor_);
    descriptor_ = -1;
  }
}

void RunDirectory::unlock() {
  if (descriptor_ < 0) return;
  // The name goes before the lock does: whoever has opened the file already sees that it has no name.
  std::error_code ignored;
  fs::remove(path_ / kLock, ignored);
  ::close(descriptor_);
  descriptor_ = -1;
  if (created_) fs::remove(path_, ignored);  // fails, as it should, where there is anything in it
}

void RunDirectory::clean_up() const {
  for (const auto& entry : fs::directory_iterator(path_))
    if (is_temporary(entry.path())) fs::remove(entry.path());
}

LineFile::LineFile(fs::path path) : path_(std::move(path)) {
  descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (descriptor_ < 0) io::fail_errno(errno, path_, "cannot be opened");
}

LineFile::~LineFile() { ::close(descriptor_); }

void LineFile::add(std::string_view line) const {
  while (!line.empty()) {
    const ssize_t written = ::write(descriptor_, line.data(), line.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      io::fail_errno(errno, path_, "cannot be written");
    }
    line.remove_prefix(static_cast<std::size_t>(written));
  }
}

void filter_lines(const fs::path& path, const std::function<bool(std::string_view)>& keep) {
  if (!fs::exists(path)) return;
  std::ifstream file(path, std::ios::binary);
  std::ostringstream all;
  if (file.peek() != std::ifstream::traits_type::eof()) all << file.rdbuf();
  if (file.bad() || all.bad()) fail(ErrorKind::io, path.string(), ": cannot be read");
  const std::string text = all.str();
  std::string kept;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    if (keep(line)) kept.append(line).push_back('\n');
    begin = end + 1;
  }
  if (kept != text) io::write_file(path, kept);
}

}  // namespace krait
