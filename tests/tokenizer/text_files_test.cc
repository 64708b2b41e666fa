#include "tokenizer/text_files.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "io/scratch.h"
#include "krait/core/random.h"
#include "krait/tokenizer/tokenizer.h"
#include "tokenizer/gpt2_scanner.h"
#include "tokenizer/random_text.h"

namespace krait::tokenizer {
namespace {

std::vector<std::size_t> piece_ends(std::string_view text, std::size_t offset) {
  std::vector<std::size_t> ends;
  for (std::size_t at = 0; at < text.size(); ends.push_back(offset + at)) at = gpt2_match_end(text, at);
  return ends;
}

TEST(NextCut, LiesBeforeSpaceThatFollowsSomethingElse) {
  EXPECT_EQ(next_cut("ab cd", 0), 2U);
  EXPECT_EQ(next_cut("ab cd", 2), 2U);
  EXPECT_EQ(next_cut("ab cd", 3), 5U);
  EXPECT_EQ(next_cut(" ab", 0), 3U);
  EXPECT_EQ(next_cut("a \n\tb\n", 2), 5U);
  EXPECT_EQ(next_cut("\xE3\x80\x80 a b", 0), 5U);  // U+3000 is white space
  EXPECT_EQ(next_cut("\xC2\xA0 a b", 0), 4U);      // so is U+00A0
  EXPECT_EQ(next_cut("\xE4\xB8\xAD a", 0), 3U);
  EXPECT_EQ(next_cut("\x80 a", 0), 1U);  // invalid bytes are not
  EXPECT_EQ(next_cut("", 0), 0U);
}

TEST(NextCut, KeepsThePieces) {
  Rng rng(3);
  for (int round = 0; round < 2000; ++round) {
    const std::string text = random_text(rng, 20);
    const std::vector<std::size_t> whole = piece_ends(text, 0);
    const std::size_t cut = next_cut(text, rng.next_u32() % (text.size() + 1));
    std::vector<std::size_t> parts = piece_ends(std::string_view(text).substr(0, cut), 0);
    const std::vector<std::size_t> rest = piece_ends(std::string_view(text).substr(cut), cut);
    parts.insert(parts.end(), rest.begin(), rest.end());
    EXPECT_EQ(parts, whole) << "cut at " << cut << " of " << testing::PrintToString(text);
  }
}

// What that is good for: the ids of a text are those of its parts. NFC and added tokens of several spaces
// included.
TEST(NextCut, KeepsTheIds) {
  const Tokenizer tokenizer = Tokenizer::from_file(KRAIT_MODELS_DIR "/gpt-neox/tokenizer.json");
  ASSERT_TRUE(tokenizer.may_cut_before_space());
  Rng rng(4);
  for (int round = 0; round < 1000; ++round) {
    const std::string text = random_text(rng, 30);
    const std::size_t cut = next_cut(text, rng.next_u32() % (text.size() + 1));
    std::vector<std::int64_t> ids = tokenizer.encode(text.substr(0, cut));
    const std::vector<std::int64_t> rest = tokenizer.encode(text.substr(cut));
    ids.insert(ids.end(), rest.begin(), rest.end());
    EXPECT_EQ(ids, tokenizer.encode(text)) << "cut at " << cut << " of " << testing::PrintToString(text);
  }
}

TEST(NextCut, IsNotForEveryTokenizer) {
  const std::string json = io::content_of(KRAIT_GOLDEN_DIR "/tokenizer-train/mixed.json");
  const auto may_cut = [&](const std::string& from, const std::string& to) {
    std::string changed = json;
    for (std::size_t at = 0; (at = changed.find(from, at)) != std::string::npos; at += to.size())
      changed.replace(at, from.size(), to);
    EXPECT_NE(changed, json);
    return Tokenizer::from_json(changed, "changed").may_cut_before_space();
  };
  EXPECT_TRUE(may_cut("<|endoftext|>", "  end"));  // cuts come before the first space
  EXPECT_FALSE(may_cut("<|endoftext|>", "the end"));
  EXPECT_FALSE(may_cut("\"rstrip\": false", "\"rstrip\": true"));
  EXPECT_FALSE(may_cut("\"single_word\": false", "\"single_word\": true"));
  EXPECT_FALSE(may_cut("\"add_prefix_space\": false", "\"add_prefix_space\": true"));
  EXPECT_FALSE(may_cut("\"use_regex\": true", "\"use_regex\": false"));
  EXPECT_FALSE(
      may_cut("\"normalizer\": null", "\"normalizer\": {\"type\": \"Prepend\", \"prepend\": \"x\"}"));
  EXPECT_TRUE(may_cut("\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}"));
}

// All texts of the files, put together again from their ranges.
std::vector<std::string> texts_of(const std::vector<std::filesystem::path>& paths, TextFiles::Cut cut,
                                  int* ranges = nullptr) {
  TextFiles files(paths, cut);
  std::vector<std::string> texts;
  bool open = false;
  while (const auto range = files.next()) {
    if (ranges != nullptr) ++*ranges;
    files.for_each_text(*range, [&](std::string_view text, bool ends_document) {
      if (!open) texts.emplace_back();
      texts.back() += text;
      open = !ends_document;
    });
  }
  EXPECT_FALSE(open);
  return texts;
}

TEST(TextFiles, RangesAddUp) {
  const io::Scratch scratch;
  std::string prose;
  while (prose.size() < 1'000'000) prose += "some words, ";
  const std::string block(700'000, 'x');
  std::string lines;
  std::vector<std::string> expected = {prose, block};
  for (int i = 0; i < 30'000; ++i) {
    expected.push_back("line " + std::to_string(i) + "\n");
    lines += "{\"id\": 3, \"text\": \"line " + std::to_string(i) + "\\n\"}\r\n";
    if (i % 1000 == 0) lines += "\n{\"text\": \"\"}\n";
  }
  const std::vector<std::filesystem::path> paths = {
      scratch.put("prose.txt", prose), scratch.put("block", block), scratch.put("lines.jsonl", lines)};
  int cut = 0;
  int whole = 0;
  EXPECT_TRUE(texts_of(paths, TextFiles::Cut::before_space, &cut) == expected);
  EXPECT_TRUE(texts_of(paths, TextFiles::Cut::never, &whole) == expected);
  EXPECT_GT(cut, whole);
  EXPECT_EQ(TextFiles(paths, TextFiles::Cut::never).total_bytes(),
            prose.size() + block.size() + lines.size());
}

}  // namespace
}  // namespace krait::tokenizer
