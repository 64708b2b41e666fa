// Tokens that are found in the text before the model sees it: special tokens such as "<|endoftext|>"
// and others added to a trained vocabulary. At each place the longest one counts.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tokenizer/regex.h"
#include "tokenizer/vocabulary.h"

namespace krait::tokenizer {

struct AddedToken {
  TokenId id = 0;
  std::string content;
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space on its left with it
  bool rstrip = false;       // and on its right
  bool normalized = true;    // looked for in normalized text, in its own normalized form
  bool special = false;
};

// Finds a set of added tokens in text, leftmost and longest first.
class AddedTokenFinder {
 public:
  // A stretch of text between tokens, or, with `token`, a token.
  struct Section {
    Range range;
    const AddedToken* token = nullptr;
  };

  // `pattern` is the token's content, or its normalized form. Of equal patterns the first counts; an
  // empty one matches nothing. `token` must outlive the finder.
  void add(std::string_view pattern, const AddedToken& token);

  // Appends the sections of `text` in order. With rstrip a section may overlap the next one.
  void find(std::string_view text, std::vector<Section>& sections) const;

 private:
  // Prefixes of the patterns, as a tree.
  struct Node {
    const AddedToken* token = nullptr;
    std::vector<std::pair<unsigned char, std::uint32_t>> children;
  };
  struct Match {
    const AddedToken* token = nullptr;
    std::size_t end = 0;
  };

  [[nodiscard]] Match longest_at(std::string_view text, std::size_t begin) const;

  std::vector<Node> nodes_ = std::vector<Node>(1);
  std::array<bool, 256> begins_{};  // the first bytes of the patterns
};

}  // namespace krait::tokenizer
