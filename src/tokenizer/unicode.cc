#include "tokenizer/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <ios>
#include <limits>
#include <vector>

#include "krait/core/error.h"

namespace krait::tokenizer {
namespace {

unsigned char byte_at(std::string_view text, std::size_t i) { return static_cast<unsigned char>(text[i]); }

utf8proc_category_t category_of(char32_t c) { return utf8proc_category(static_cast<utf8proc_int32_t>(c)); }

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

CharClass slow_class_of(char32_t c) {
  if (is_white_space(c)) return CharClass::space;
  switch (category_of(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO: return CharClass::letter;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO: return CharClass::number;
    default: return CharClass::other;
  }
}

constexpr std::array<CharClass, 128> make_ascii_classes() {
  std::array<CharClass, 128> table{};
  for (unsigned c = 0; c < 128; ++c) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    const bool space = c == ' ' || (c >= 0x09 && c <= 0x0D);
    table[c] = letter                   ? CharClass::letter
               : (c >= '0' && c <= '9') ? CharClass::number
               : space                  ? CharClass::space
                                        : CharClass::other;
  }
  return table;
}
constexpr std::array<CharClass, 128> kAsciiClasses = make_ascii_classes();

// True for characters before which normalization can always cut: starters that do not decompose and
// never combine with what stands before them. (Those that do combine are marks and Hangul jamo.)
bool starts_afresh(char32_t c) {
  if (c < 0x300) return true;
  if (c >= 0x1100 && c <= 0x11FF) return false;
  const utf8proc_property_t* property = utf8proc_get_property(static_cast<utf8proc_int32_t>(c));
  if (property->combining_class != 0) return false;
  if (property->category == UTF8PROC_CATEGORY_MN || property->category == UTF8PROC_CATEGORY_MC ||
      property->category == UTF8PROC_CATEGORY_ME) {
    return false;
  }
  const bool has_canonical_decomposition =
      property->decomp_type == 0 && property->decomp_seqindex != std::numeric_limits<std::uint16_t>::max();
  return !has_canonical_decomposition;
}

// utf8proc_map in its steps, but for the order of combining marks: its sort is quadratic.
void append_nfc(std::string& out, std::string_view text) {
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  const auto combining_class = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  std::vector<utf8proc_int32_t> characters;
  for (std::size_t i = 0; i < text.size();) {
    const CodePoint c = code_point_at(text, i);
    i += c.length;
    std::array<utf8proc_int32_t, 32> parts{};  // no character has more than four
    int boundary = 0;
    const utf8proc_ssize_t count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.value),
                                                           parts.data(), parts.size(), kOptions, &boundary);
    require(count >= 0 && count <= static_cast<utf8proc_ssize_t>(parts.size()),
            "[tokenizer] normalization of U+", std::hex, static_cast<std::uint32_t>(c.value), " failed");
    characters.insert(characters.end(), parts.begin(), parts.begin() + count);
  }
  for (auto begin = characters.begin(); begin != characters.end();) {
    const auto is_starter = [&](utf8proc_int32_t c) { return combining_class(c) == 0; };
    begin = std::find_if_not(begin, characters.end(), is_starter);
    const auto end = std::find_if(begin, characters.end(), is_starter);
    std::stable_sort(begin, end, [&](utf8proc_int32_t x, utf8proc_int32_t y) {
      return combining_class(x) < combining_class(y);
    });
    begin = end;
  }
  const utf8proc_ssize_t length =
      utf8proc_normalize_utf32(characters.data(), static_cast<utf8proc_ssize_t>(characters.size()), kOptions);
  for (utf8proc_ssize_t i = 0; i < length; ++i) {
    append_utf8(out, static_cast<char32_t>(characters[static_cast<std::size_t>(i)]));
  }
}

}  // namespace

void append_utf8(std::string& out, char32_t value) {
  const auto put = [&](char32_t byte) { out.push_back(static_cast<char>(static_cast<unsigned char>(byte))); };
  if (value < 0x80) {
    put(value);
  } else if (value < 0x800) {
    put(0xC0U | (value >> 6));
    put(0x80U | (value & 0x3FU));
  } else if (value < 0x10000) {
    put(0xE0U | (value >> 12));
    put(0x80U | ((value >> 6) & 0x3FU));
    put(0x80U | (value & 0x3FU));
  } else {
    put(0xF0U | (value >> 18));
    put(0x80U | ((value >> 12) & 0x3FU));
    put(0x80U | ((value >> 6) & 0x3FU));
    put(0x80U | (value & 0x3FU));
  }
}

std::size_t ascii_prefix(std::string_view text) {
  std::size_t i = 0;
  for (; i + 8 <= text.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, text.data() + i, 8);
    if ((word & 0x8080808080808080U) != 0) break;
  }
  while (i < text.size() && byte_at(text, i) < 0x80) ++i;
  return i;
}

// The bounds of the second byte keep out overlong forms, surrogates and values above U+10FFFF
// (Unicode Standard, table 3-7).
Utf8Step utf8_step(std::string_view bytes, std::size_t at) {
  using Kind = Utf8Step::Kind;
  const unsigned char first = byte_at(bytes, at);
  if (first < 0x80) return {Kind::valid, 1};
  if (first < 0xC2 || first > 0xF4) return {Kind::invalid, 1};
  const std::size_t length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  unsigned char low = 0x80;
  unsigned char high = 0xBF;
  if (first == 0xE0) low = 0xA0;
  if (first == 0xED) high = 0x9F;
  if (first == 0xF0) low = 0x90;
  if (first == 0xF4) high = 0x8F;
  for (std::size_t i = 1; i < length; ++i) {
    if (at + i == bytes.size()) return {Kind::incomplete, i};
    const unsigned char next = byte_at(bytes, at + i);
    if (next < low || next > high) return {Kind::invalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Kind::valid, length};
}

bool is_valid_utf8(std::string_view text) {
  std::size_t i = ascii_prefix(text);
  while (i < text.size()) {
    const Utf8Step step = utf8_step(text, i);
    if (step.kind != Utf8Step::Kind::valid) return false;
    i += step.length;
    if (i < text.size() && byte_at(text, i) < 0x80) i += ascii_prefix(text.substr(i));
  }
  return true;
}

std::size_t append_valid_utf8(std::string& out, std::string_view bytes, bool at_end) {
  std::size_t i = 0;
  while (i < bytes.size()) {
    const Utf8Step step = utf8_step(bytes, i);
    if (step.kind == Utf8Step::Kind::valid) {
      out.append(bytes.substr(i, step.length));
    } else if (step.kind == Utf8Step::Kind::invalid || at_end) {
      out.append(kReplacementCharacter);
    } else {
      return i;
    }
    i += step.length;
  }
  return i;
}

CharClass class_of(char32_t c) { return c < 128 ? kAsciiClasses[c] : slow_class_of(c); }

bool is_punctuation(char32_t c) {
  if (c < 0x80) return c > 0x20 && c < 0x7F && kAsciiClasses[c] == CharClass::other;
  switch (category_of(c)) {
    case UTF8PROC_CATEGORY_PC:
    case UTF8PROC_CATEGORY_PD:
    case UTF8PROC_CATEGORY_PS:
    case UTF8PROC_CATEGORY_PE:
    case UTF8PROC_CATEGORY_PI:
    case UTF8PROC_CATEGORY_PF:
    case UTF8PROC_CATEGORY_PO: return true;
    default: return false;
  }
}

bool is_word(char32_t c) {
  // Other_Alphabetic beyond marks, and the two joiners.
  if ((c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
      (c >= 0x1F170 && c <= 0x1F189) || c == 0x200C || c == 0x200D) {
    return true;
  }
  switch (category_of(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default: return false;
  }
}

std::string in_quotes(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  constexpr std::string_view kHex = "0123456789abcdef";
  std::string out = "'";
  for (std::size_t i = 0; i < text.size();) {
    if (out.size() > kLongest) {
      out.append("...");
      break;
    }
    const Utf8Step step = utf8_step(text, i);
    const unsigned char first = byte_at(text, i);
    if (step.kind == Utf8Step::Kind::valid && first >= 0x20 && first != 0x7F) {
      out.append(text.substr(i, step.length));
      i += step.length;
    } else if (first == '\n') {
      out.append("\\n");
      ++i;
    } else {
      out.append("\\x").append(1, kHex[first >> 4U]).append(1, kHex[first & 15U]);
      ++i;
    }
  }
  return out + "'";
}

// Most text is in form C already, so only the stretches between two characters that start afresh
// are handed to utf8proc, each with the character that stands before it.
std::string to_nfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  std::size_t copied = 0;    // text up to here is in `out`
  std::size_t previous = 0;  // begin of the last character that starts afresh
  std::size_t i = ascii_prefix(text);
  if (i > 0) previous = i - 1;
  while (i < text.size()) {
    const CodePoint c = code_point_at(text, i);
    if (starts_afresh(c.value)) {
      previous = i;
      i += c.length;
      continue;
    }
    std::size_t end = i + c.length;
    while (end < text.size()) {
      const CodePoint next = code_point_at(text, end);
      if (starts_afresh(next.value)) break;
      end += next.length;
    }
    const std::size_t begin = std::max(previous, copied);
    out.append(text.substr(copied, begin - copied));
    append_nfc(out, text.substr(begin, end - begin));
    copied = i = previous = end;
  }
  out.append(text.substr(copied));
  return out;
}

}  // namespace krait::tokenizer
