// Errors: every failure of the library is a krait::Error with a one-line message that names the
// file, tensor or option, what was found, and what was expected.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace krait {

enum class ErrorKind {
  invalid_argument,  // a tensor, option or file whose content is not what was expected
  not_found,         // a file, directory, model or revision that does not exist
  io,                // reading or writing failed (permissions, full disk, truncated read)
  network,           // the hub could not be reached or refused
  out_of_memory,     // an allocation failed
  interrupted,       // the caller asked to stop
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  [[nodiscard]] ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

// Concatenates its arguments with operator<< into one string.
template <typename... Parts>
[[nodiscard]] std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws Error(kind) whose message is the concatenation of `parts`.
template <typename... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  throw Error(kind, concat(parts...));
}

// Throws Error(invalid_argument) unless `condition` holds. The parts are only formatted on failure.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(ErrorKind::invalid_argument, parts...);
}

}  // namespace krait
