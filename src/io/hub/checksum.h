// The two checksums by which the hub names contents: SHA-256 for large files (Git LFS), and for small
// ones the SHA-1 that Git gives a blob (over "blob <size>", a NUL and the bytes).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace krait::hub {

class Checksum {
 public:
  // The kind follows from the length of `expected`: 64 hexadecimal digits or 40. Anything else is
  // no checksum (known() is false). `size` is that of the whole content.
  Checksum(std::string_view expected, std::uint64_t size);
  ~Checksum();
  Checksum(Checksum&&) noexcept;
  Checksum& operator=(Checksum&&) noexcept;

  [[nodiscard]] bool known() const { return state_ != nullptr; }
  void update(std::span<const char> bytes);
  // The digest of what was given, in lower-case hexadecimal; empty if not known(). Ends the sum.
  [[nodiscard]] std::string finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace krait::hub
