#include "tokenizer/added_tokens.h"

#include <algorithm>

#include "tokenizer/unicode.h"

namespace krait::tokenizer {
namespace {

bool touches_word(std::string_view text, Range range) {
  if (range.begin > 0 && is_word(code_point_before(text, range.begin).value)) return true;
  return range.end < text.size() && is_word(code_point_at(text, range.end).value);
}

std::size_t skip_spaces_back(std::string_view text, std::size_t end, std::size_t limit) {
  while (end > limit) {
    const CodePoint c = code_point_before(text, end);
    if (!is_space(c.value)) break;
    end -= c.length;
  }
  return end;
}

std::size_t skip_spaces(std::string_view text, std::size_t begin) {
  while (begin < text.size()) {
    const CodePoint c = code_point_at(text, begin);
    if (!is_space(c.value)) break;
    begin += c.length;
  }
  return begin;
}

}  // namespace

void AddedTokenFinder::add(std::string_view pattern, const AddedToken& token) {
  if (pattern.empty()) return;
  begins_[static_cast<unsigned char>(pattern[0])] = true;
  std::uint32_t at = 0;
  for (const char c : pattern) {
    const auto byte = static_cast<unsigned char>(c);
    const auto& children = nodes_[at].children;
    const auto child =
        std::find_if(children.begin(), children.end(), [&](const auto& edge) { return edge.first == byte; });
    if (child != children.end()) {
      at = child->second;
      continue;
    }
    const auto added = static_cast<std::uint32_t>(nodes_.size());
    nodes_[at].children.emplace_back(byte, added);
    nodes_.emplace_back();
    at = added;
  }
  if (nodes_[at].token == nullptr) nodes_[at].token = &token;
}

AddedTokenFinder::Match AddedTokenFinder::longest_at(std::string_view text, std::size_t begin) const {
  Match longest;
  std::uint32_t at = 0;
  for (std::size_t i = begin; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const auto& children = nodes_[at].children;
    const auto child =
        std::find_if(children.begin(), children.end(), [&](const auto& edge) { return edge.first == byte; });
    if (child == children.end()) break;
    at = child->second;
    if (nodes_[at].token != nullptr) longest = {nodes_[at].token, i + 1};
  }
  return longest;
}

// As Hugging Face does it, white space that rstrip takes is not taken from the tokens that begin in it:
// they count too, unless lstrip leaves nothing of them.
void AddedTokenFinder::find(std::string_view text, std::vector<Section>& sections) const {
  std::size_t covered = 0;  // the end of the last section
  Range spaces;             // the last white space that rstrip took: no run is walked twice
  for (std::size_t i = 0; nodes_.size() > 1 && i < text.size();) {
    if (!begins_[static_cast<unsigned char>(text[i])]) {
      ++i;
      continue;
    }
    const Match match = longest_at(text, i);
    if (match.token == nullptr) {
      ++i;
      continue;
    }
    Range range{i, match.end};
    i = match.end;
    if (match.token->single_word && touches_word(text, range)) continue;
    if (match.token->lstrip) range.begin = std::max(skip_spaces_back(text, range.begin, covered), covered);
    if (match.token->rstrip) {
      if (range.end < spaces.begin || range.end > spaces.end)
        spaces = {range.end, skip_spaces(text, range.end)};
      range.end = spaces.end;
    }
    if (covered < range.begin) sections.push_back({{covered, range.begin}, nullptr});
    if (range.begin < range.end) sections.push_back({range, match.token});
    covered = range.end;
  }
  if (covered < text.size()) sections.push_back({{covered, text.size()}, nullptr});
}

}  // namespace krait::tokenizer
