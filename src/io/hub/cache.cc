#include "io/hub/cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>

#include "io/hub/names.h"
#include "io/hub/retry.h"
#include "io/system_error.h"
#include "krait/io/atomic_file.h"

namespace krait::hub {
namespace {

namespace fs = std::filesystem;

fs::path folder_of(std::string_view repo) {
  std::string name = "models--";
  for (const char c : repo) {
    if (c == '/') {
      name += "--";
    } else {
      name += c;
    }
  }
  return name;
}

void make_directories(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) fail(ErrorKind::io, path.string(), ": cannot be created: ", error.message());
}

// True if the descriptor is still what lies at `path`: newer versions of Python's filelock remove the
// file on release, and a lock on a removed file guards nothing.
bool is_current(int descriptor, const fs::path& path) {
  struct stat held {};
  struct stat named {};
  return ::fstat(descriptor, &held) == 0 && ::stat(path.c_str(), &named) == 0 &&
         held.st_dev == named.st_dev && held.st_ino == named.st_ino;
}

}  // namespace

FileLock::FileLock(const fs::path& path, std::string_view wanted_for, const Options& options) {
  constexpr std::chrono::milliseconds kPause{50};
  bool told = false;
  for (;;) {
    descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (descriptor_ < 0) io::fail_errno(errno, path, "cannot be opened");
    const bool locked = ::flock(descriptor_, LOCK_EX | LOCK_NB) == 0;
    const int error = locked ? 0 : errno;
    if (locked && is_current(descriptor_, path)) return;
    if (!locked && error != EWOULDBLOCK && error != EINTR) {
      if (options.log)
        options.log(LogLevel::warning, concat(path.string(), ": this file system has no locks (",
                                              std::generic_category().message(error),
                                              "): let no second process fetch the same model now"));
      return;
    }
    ::close(descriptor_);
    descriptor_ = -1;
    if (error == EWOULDBLOCK && !told && options.log)
      options.log(LogLevel::info, concat(wanted_for, ": another process is downloading it, waiting"));
    told = told || error == EWOULDBLOCK;
    wait(options, kPause);
  }
}

FileLock::~FileLock() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

Cache::Cache(fs::path root, const std::string& repo)
    : root_(std::move(root)), repo_(root_ / folder_of(repo)), locks_(root_ / ".locks" / folder_of(repo)) {}

std::optional<std::string> Cache::commit_of(const std::string& revision) const {
  if (is_commit(revision)) return revision;
  std::ifstream file(repo_ / "refs" / revision);
  std::string commit;
  file >> commit;
  if (!is_commit(commit)) return std::nullopt;
  return commit;
}

void Cache::write_ref(const std::string& revision, const std::string& commit) const {
  const fs::path path = repo_ / "refs" / revision;
  make_directories(path.parent_path());
  io::write_file(path, commit);
}

fs::path Cache::snapshot(const std::string& commit) const { return repo_ / "snapshots" / commit; }

bool Cache::has(const std::string& commit, std::string_view file) const {
  std::error_code unreadable;  // counts as absent; fetching it then tells why
  return fs::is_regular_file(snapshot(commit) / file, unreadable);
}

bool Cache::lacks(const std::string& commit, std::string_view file) const {
  std::error_code unreadable;
  return fs::exists(repo_ / ".no_exist" / commit / file, unreadable);
}

void Cache::note_lack(const std::string& commit, std::string_view file) const {
  if (lacks(commit, file)) return;
  const fs::path path = repo_ / ".no_exist" / commit / file;
  make_directories(path.parent_path());
  if (!std::ofstream(path)) fail(ErrorKind::io, path.string(), ": cannot be created");
}

fs::path Cache::blob(const std::string& etag) const { return repo_ / "blobs" / etag; }

fs::path Cache::lock(const std::string& etag) const { return locks_ / (etag + ".lock"); }

void Cache::prepare(const std::string& commit) const {
  make_directories(snapshot(commit));
  make_directories(repo_ / "blobs");
  make_directories(locks_);
}

void Cache::link(const std::string& commit, const std::string& file, const std::string& etag) const {
  const fs::path path = snapshot(commit) / file;
  make_directories(path.parent_path());
  const fs::path target = blob(etag).lexically_relative(path.parent_path());
  // Only the holder of the blob's lock comes here with this etag, so the temporary name is free.
  const fs::path temporary = path.parent_path() / (".krait-" + etag + ".tmp");
  ::unlink(temporary.c_str());
  if (::symlink(target.c_str(), temporary.c_str()) != 0) io::fail_errno(errno, path, "cannot be linked");
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    const int error = errno;
    ::unlink(temporary.c_str());
    io::fail_errno(error, path, "cannot be linked");
  }
}

std::uint64_t Cache::free_bytes() const {
  std::error_code error;
  const fs::space_info space = fs::space(repo_, error);
  if (error) fail(ErrorKind::io, repo_.string(), ": cannot be asked for its free space: ", error.message());
  return space.available;
}

}  // namespace krait::hub
