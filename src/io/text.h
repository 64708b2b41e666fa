// Text from files, made fit for a one-line message.
#pragma once

#include <string>
#include <string_view>

namespace krait::io {

// In quotation marks, with control characters escaped and long text cut.
[[nodiscard]] inline std::string printable(std::string_view text) {
  constexpr std::size_t kLongest = 120;
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text.substr(0, kLongest)) {
    const auto code = static_cast<unsigned char>(c);
    if (code < 0x20 || code == 0x7f) {
      out += "\\x";
      out += kHex[code >> 4];
      out += kHex[code & 0xf];
    } else {
      out += c;
    }
  }
  return out + (text.size() > kLongest ? "...\"" : "\"");
}

}  // namespace krait::io
