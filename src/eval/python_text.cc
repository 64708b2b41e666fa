#include "eval/python_text.h"

#include <algorithm>
#include <array>

namespace krait {
namespace {

constexpr char32_t kInvalid = 0xfffd;

struct Character {
  char32_t code = 0;
  std::size_t bytes = 0;
};

// The character that `text`, which is not empty, begins with.
Character first_character(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {.code = lead, .bytes = 1};
  const std::size_t bytes = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  if (lead < 0xc2 || lead > 0xf4 || text.size() < bytes) return {.code = kInvalid, .bytes = 1};
  char32_t code = lead & (0x7fU >> bytes);
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xc0U) != 0x80U) return {.code = kInvalid, .bytes = 1};
    code = code << 6U | (byte(i) & 0x3fU);
  }
  return {.code = code, .bytes = bytes};
}

// Where the last character of `text`, which is not empty, begins.
std::size_t last_character(std::string_view text) {
  std::size_t at = text.size() - 1;
  while (at > 0 && text.size() - at < 4 && (static_cast<unsigned char>(text[at]) & 0xc0U) == 0x80U) --at;
  return first_character(text.substr(at)).bytes == text.size() - at ? at : text.size() - 1;
}

// str.isspace()
bool is_space(char32_t c) {
  constexpr std::array<char32_t, 9> kOthers{0x20, 0x85, 0xa0, 0x1680, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000};
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x1f) || (c >= 0x2000 && c <= 0x200a) ||
         std::ranges::find(kOthers, c) != kOthers.end();
}

}  // namespace

std::string_view strip_left(std::string_view text) {
  while (!text.empty()) {
    const Character c = first_character(text);
    if (!is_space(c.code)) break;
    text.remove_prefix(c.bytes);
  }
  return text;
}

std::string_view strip_right(std::string_view text) {
  while (!text.empty()) {
    const std::size_t at = last_character(text);
    if (!is_space(first_character(text.substr(at)).code)) break;
    text = text.substr(0, at);
  }
  return text;
}

std::int64_t count_characters(std::string_view text) {
  std::int64_t count = 0;
  for (; !text.empty(); ++count) text.remove_prefix(first_character(text).bytes);
  return count;
}

std::int64_t count_words(std::string_view text) {
  std::int64_t words = 1;
  bool in_space = false;
  while (!text.empty()) {
    const Character c = first_character(text);
    const bool space = is_space(c.code);
    if (space && !in_space) ++words;
    in_space = space;
    text.remove_prefix(c.bytes);
  }
  return words;
}

}  // namespace krait
