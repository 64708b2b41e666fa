#include "tokenizer/regex.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "krait/core/error.h"
#include "krait/core/random.h"
#include "tokenizer/gpt2_scanner.h"
#include "tokenizer/random_text.h"

namespace krait::tokenizer {
namespace {

std::vector<std::string> matches(const char* pattern, std::string_view text) {
  const Regex regex(pattern, "test");
  Regex::Workspace workspace;
  std::vector<Range> ranges;
  regex.find_all(text, workspace, ranges);
  std::vector<std::string> found;
  for (const Range& range : ranges) found.emplace_back(text.substr(range.begin, range.end - range.begin));
  return found;
}
using Strings = std::vector<std::string>;

TEST(Regex, OnigurumasClasses) {
  EXPECT_EQ(matches(R"(\s+)", "a \u00a0\u180e\u3000b"), (Strings{" \u00a0", "\u3000"}));
  EXPECT_EQ(matches(R"([^\s]+)", "a \u180e"), (Strings{"a", "\u180e"}));
  EXPECT_EQ(matches(R"(\S+)", "a \u180e"), (Strings{"a", "\u180e"}));
  EXPECT_EQ(matches(R"([^\S\n]+)", "a \t\nb\u00a0"), (Strings{" \t", "\u00a0"}));
  EXPECT_EQ(matches(R"(\w+)", "a_1e\u0301 \u00b2-\u2460\u24b6"), (Strings{"a_1e\u0301", "\u00b2", "\u24b6"}));
  EXPECT_EQ(matches(R"(\W+)", "a -b"), (Strings{" -"}));
  EXPECT_EQ(matches(R"(\h+)", "xA0g f"), (Strings{"A0", "f"}));
  EXPECT_EQ(matches(R"(e\b.)", "e\u0301e "), (Strings{"e "}));
  EXPECT_EQ(matches(R"(e\B.)", "e\u0301e "), (Strings{"e\u0301"}));
  EXPECT_EQ(matches(R"(\p{Han}+)", "\u5b57\u3005\u30fc\u3042"), (Strings{"\u5b57\u3005"}));
  EXPECT_EQ(matches(R"(\p{^Han}+)", "\u5b57a"), (Strings{"a"}));
  EXPECT_EQ(matches(R"([[:digit:]x]+)", "1x-"), (Strings{"1x"}));
}

TEST(Regex, RubysOptions) {
  EXPECT_EQ(matches("(?m:.+)", "a\nb"), (Strings{"a\nb"}));
  EXPECT_EQ(matches(".+", "a\nb\rc"), (Strings{"a", "b\rc"}));
  EXPECT_EQ(matches("^.", "a\nb"), (Strings{"a", "b"}));
  EXPECT_EQ(matches(".$", "a\nb"), (Strings{"a", "b"}));
  EXPECT_EQ(matches("(?i:'S|K)", "'s'\u017f\u212a"), (Strings{"'s", "'\u017f", "\u212a"}));
}

TEST(Regex, EmptyMatches) {
  EXPECT_EQ(matches("x*", "axxb"), (Strings{"", "xx", ""}));
  EXPECT_EQ(matches("x*", ""), Strings{});
  EXPECT_EQ(matches("(?=b)", "ab\u00e9b"), (Strings{"", ""}));
  EXPECT_EQ(matches("", "\u00e9a"), (Strings{"", "", ""}));
}

TEST(Regex, WhatHasNoTranslationIsAnError) {
  for (const char* pattern : {"[a&&b]", "[a[b]]", R"([\Wa])", R"([\H])", "(", "[a", R"(\p{Nonsense})",
                              R"(\C)", "a{9999999}", R"(\)"}) {
    SCOPED_TRACE(pattern);
    try {
      const Regex regex(pattern, "file.json: normalizer Replace");
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).find("file.json: normalizer Replace: the pattern "), 0U)
          << error.what();
    }
  }
}

// Catastrophic backtracking ends in an error, not in a hang.
TEST(Regex, GivesUp) {
  EXPECT_THROW(matches("(?:a+)+$", std::string(5000, 'a') + "b"), Error);
  EXPECT_THROW(matches("(?:(?:a|b|ab)*)*c", std::string(100000, 'a') + "dc"), Error);
}

TEST(Gpt2Scanner, EqualsThePattern) {
  const Regex regex(kGpt2Pattern, "test");
  Regex::Workspace workspace;
  Rng rng(6);
  for (int round = 0; round < 20000; ++round) {
    const std::string text = random_text(rng, 1 + static_cast<int>(rng.next_u32() % 30));
    SCOPED_TRACE(text);
    std::vector<Range> expected;
    regex.find_all(text, workspace, expected);
    std::vector<Range> scanned;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = gpt2_match_end(text, at);
      ASSERT_GT(end, at);
      scanned.push_back({at, end});
      at = end;
    }
    ASSERT_EQ(scanned, expected);
  }
}

}  // namespace
}  // namespace krait::tokenizer
