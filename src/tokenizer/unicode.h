// UTF-8 and the few Unicode properties that tokenizers look at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace krait::tokenizer {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

struct CodePoint {
  char32_t value = 0;
  std::size_t length = 0;  // in bytes
};

// The code point at `at`, which must lie in valid UTF-8.
[[nodiscard]] inline CodePoint code_point_at(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) {
    return static_cast<char32_t>(static_cast<unsigned char>(text[at + i]));
  };
  const char32_t first = byte(0);
  if (first < 0x80) return {first, 1};
  if (first < 0xE0) return {((first & 0x1FU) << 6) | (byte(1) & 0x3FU), 2};
  if (first < 0xF0) return {((first & 0x0FU) << 12) | ((byte(1) & 0x3FU) << 6) | (byte(2) & 0x3FU), 3};
  return {((first & 0x07U) << 18) | ((byte(1) & 0x3FU) << 12) | ((byte(2) & 0x3FU) << 6) | (byte(3) & 0x3FU),
          4};
}

// The code point that ends just before `end` > 0 in valid UTF-8.
[[nodiscard]] inline CodePoint code_point_before(std::string_view text, std::size_t end) {
  std::size_t begin = end - 1;
  while ((static_cast<unsigned char>(text[begin]) & 0xC0U) == 0x80U) --begin;
  return code_point_at(text, begin);
}

void append_utf8(std::string& out, char32_t value);

// The length of the longest prefix that is ASCII.
[[nodiscard]] std::size_t ascii_prefix(std::string_view text);

// One step through bytes that may be anything. `length` bytes are a character (valid), or cannot
// become one whatever follows (invalid: the "maximal subpart" of the Unicode Standard, section 3.9), or
// are the beginning of one that the text ends in (incomplete).
struct Utf8Step {
  enum class Kind : std::uint8_t { valid, invalid, incomplete };
  Kind kind = Kind::valid;
  std::size_t length = 0;
};
[[nodiscard]] Utf8Step utf8_step(std::string_view bytes, std::size_t at);

[[nodiscard]] bool is_valid_utf8(std::string_view text);

// Appends `bytes` with each invalid sequence replaced by U+FFFD. With `at_end` an incomplete character
// at the end is one too; without, it is left out. Returns the number of bytes that were taken.
std::size_t append_valid_utf8(std::string& out, std::string_view bytes, bool at_end);

enum class CharClass : std::uint8_t { letter, number, space, other };

// \p{L}, \p{N}, White_Space, or neither.
[[nodiscard]] CharClass class_of(char32_t c);
[[nodiscard]] inline bool is_space(char32_t c) { return class_of(c) == CharClass::space; }
[[nodiscard]] inline bool is_number(char32_t c) { return class_of(c) == CharClass::number; }
// \p{P}, or one of ASCII's symbols.
[[nodiscard]] bool is_punctuation(char32_t c);
// \w: alphabetic, mark, decimal digit, connector punctuation or joiner.
[[nodiscard]] bool is_word(char32_t c);

// Any bytes for a one-line message: in quotes, control characters and invalid bytes escaped, and cut
// where they are long.
[[nodiscard]] std::string in_quotes(std::string_view text);

// Normalization form C of valid UTF-8.
[[nodiscard]] std::string to_nfc(std::string_view text);

}  // namespace krait::tokenizer
