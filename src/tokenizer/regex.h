// A regular expression of a tokenizer.json. Those files are written for Oniguruma with Ruby's syntax;
// the pattern is translated to PCRE2, and what PCRE2 would read differently is an error.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace krait::tokenizer {

// A half-open range of bytes.
struct Range {
  std::size_t begin = 0;
  std::size_t end = 0;
  friend bool operator==(const Range&, const Range&) = default;
};

// `pattern` in PCRE2's syntax with the same meaning. Throws Error(invalid_argument), beginning with
// `where`, for constructs that have none: set operations in character classes, \W and \H within one.
[[nodiscard]] std::string pattern_for_pcre2(std::string_view pattern, std::string_view where);

class Regex {
 public:
  // Working memory of matching; one thread uses it at a time.
  class Workspace;

  // Throws Error(invalid_argument), beginning with `where`, where the pattern does not compile.
  Regex(std::string_view pattern, std::string_view where);

  // Appends the successive matches in `text` (valid UTF-8), left to right. An empty match directly after
  // a match does not count, and an empty text has none. Throws Error(invalid_argument) where PCRE2 gives up.
  void find_all(std::string_view text, Workspace& workspace, std::vector<Range>& matches) const;

 private:
  struct Code;
  std::shared_ptr<const Code> code_;
};

class Regex::Workspace {
 public:
  Workspace();
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

 private:
  friend class Regex;
  struct Memory;
  std::unique_ptr<Memory> memory_;  // allocated at the first match: many tokenizers need no pattern
};

}  // namespace krait::tokenizer
