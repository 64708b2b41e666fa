#include "tokenizer/gpt2_scanner.h"

#include "tokenizer/unicode.h"

namespace krait::tokenizer {
namespace {

// The end of the run of characters of class `wanted` that begins at `i`.
std::size_t run_end(std::string_view text, std::size_t i, CharClass wanted) {
  while (i < text.size()) {
    const CodePoint c = code_point_at(text, i);
    if (class_of(c.value) != wanted) break;
    i += c.length;
  }
  return i;
}

// 's 't 're 've 'm 'll 'd: the length of the one that `text` begins with, or 0.
std::size_t contraction_length(std::string_view text) {
  if (text.size() < 2 || text[0] != '\'') return 0;
  switch (text[1]) {
    case 's':
    case 't':
    case 'm':
    case 'd': return 2;
    case 'r':
    case 'v': return text.size() > 2 && text[2] == 'e' ? 3 : 0;
    case 'l': return text.size() > 2 && text[2] == 'l' ? 3 : 0;
    default: return 0;
  }
}

}  // namespace

std::size_t gpt2_match_end(std::string_view text, std::size_t begin) {
  if (const std::size_t length = contraction_length(text.substr(begin)); length > 0) return begin + length;

  // " ?" takes one space (U+0020 only) into a run of letters, numbers or others.
  std::size_t i = begin;
  if (text[i] == ' ' && i + 1 < text.size()) ++i;
  const CodePoint first = code_point_at(text, i);
  const CharClass kind = class_of(first.value);
  if (kind != CharClass::space) return run_end(text, i + first.length, kind);

  // \s+(?!\S) gives its last character back where something follows that could use it; a single
  // white-space character before other text falls to \s+.
  const std::size_t end = run_end(text, begin, CharClass::space);
  if (end == text.size()) return end;
  const std::size_t last = end - code_point_before(text, end).length;
  return last > begin ? last : end;
}

}  // namespace krait::tokenizer
