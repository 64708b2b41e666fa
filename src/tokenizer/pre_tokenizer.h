// The pre-tokenizers of a tokenizer.json: ByteLevel, Split, Digits, Punctuation, Metaspace and Sequence.
// They cut a text into the pieces that byte-pair encoding never merges across.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/pattern.h"

namespace krait::tokenizer {

// What becomes of a match when a text is split at matches.
enum class SplitBehavior : std::uint8_t {
  removed,               // dropped
  isolated,              // a piece of its own
  merged_with_previous,  // the end of the piece before it
  merged_with_next,      // the beginning of the piece after it
  contiguous,            // a piece together with the matches next to it
};

class PreTokenizer {
 public:
  // Working memory; one thread uses it at a time.
  struct Workspace {
    struct Segment {
      Range range;
      bool is_match = false;
    };
    std::string text;           // what the pieces look at, where a step has changed the text
    std::vector<Range> pieces;  // the result
    std::string next_text;
    std::vector<Range> next_pieces;
    std::vector<Range> matches;
    std::vector<Segment> segments;
    Regex::Workspace regex;
  };

  // `config` is the file's "pre_tokenizer" and may be null. Throws Error(invalid_argument), beginning
  // with `name`, for what is not supported.
  PreTokenizer(const nlohmann::json& config, std::string_view name);

  // True where the last step writes bytes in the byte alphabet. After leave_bytes it no longer does so:
  // a model that reads bytes spares both sides the spelling.
  [[nodiscard]] bool ends_in_byte_level() const;
  void leave_bytes();
  // True where ByteLevel with GPT-2's pattern is all there is.
  [[nodiscard]] bool is_gpt2() const;

  // Cuts `text`, which is not empty, into workspace.pieces; returns the text that they index, either
  // `text` itself or workspace.text. `at_start`: the text is the beginning of the input, which Metaspace
  // may want to know.
  [[nodiscard]] std::string_view split(std::string_view text, bool at_start, Workspace& workspace) const;

 private:
  struct ByteLevel {
    bool add_prefix_space = false;
    bool use_regex = true;
    bool spell_bytes = true;
  };
  struct Split {
    Pattern pattern;
    SplitBehavior behavior = SplitBehavior::isolated;
    bool invert = false;  // what lies between the matches counts as the match
  };
  struct Digits {
    bool individual = false;
  };
  struct Punctuation {
    SplitBehavior behavior = SplitBehavior::isolated;
  };
  struct Metaspace {
    enum class Prepend : std::uint8_t { first, always, never };
    std::string replacement;
    Prepend prepend = Prepend::always;
    bool split = true;
  };
  struct Cutter;

  void add(const Component& component);

  std::vector<std::variant<ByteLevel, Split, Digits, Punctuation, Metaspace>> steps_;
};

}  // namespace krait::tokenizer
