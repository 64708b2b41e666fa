// What the system said, as an Error.
#pragma once

#include <cerrno>
#include <filesystem>
#include <string_view>
#include <system_error>

#include "krait/core/error.h"

namespace krait::io {

// "path: cannot be opened: Permission denied". A missing file or directory is Error(not_found).
[[noreturn]] inline void fail_errno(int error, const std::filesystem::path& path, std::string_view action) {
  const ErrorKind kind = error == ENOENT || error == ENOTDIR ? ErrorKind::not_found : ErrorKind::io;
  fail(kind, path.string(), ": ", action, ": ", std::generic_category().message(error));
}

}  // namespace krait::io
