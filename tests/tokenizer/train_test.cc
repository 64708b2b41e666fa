#include "krait/tokenizer/train.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "io/scratch.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/tokenizer/tokenizer.h"
#include "tokenizer/bpe_trainer.h"

namespace krait {
namespace {

using io::content_of;
using io::Scratch;
using tokenizer::BpeTrainer;
using tokenizer::TokenId;
using tokenizer::WordCounts;

const std::string kGolden = KRAIT_GOLDEN_DIR "/tokenizer-train/";
const std::string kShakespeare = KRAIT_SOURCE_DIR "/tests/data/tinyshakespeare.txt";

std::string trained(int threads, const std::vector<std::filesystem::path>& texts,
                    const TokenizerTrainOptions& options) {
  Context ctx({.threads = threads});
  return train_tokenizer(ctx, texts, options).json;
}

std::string refusal(const std::vector<std::filesystem::path>& texts, const TokenizerTrainOptions& options) {
  return io::message_of([&] { return trained(2, texts, options); });
}

// Two long texts are compared without being printed.
void expect_same_file(const std::string& ours, const std::string& theirs) {
  const auto difference = std::mismatch(ours.begin(), ours.end(), theirs.begin(), theirs.end());
  EXPECT_TRUE(ours == theirs) << "first difference at byte " << difference.first - ours.begin() << ": "
                              << std::string(difference.first, ours.end()).substr(0, 60);
}

TEST(TrainTokenizer, WritesTheFileOfHuggingFace) {
  expect_same_file(trained(2, {kGolden + "mixed.jsonl"}, {.vocab_size = 700}),
                   content_of(kGolden + "mixed.json"));
  expect_same_file(trained(2, {kShakespeare}, {.vocab_size = 512}), content_of(kGolden + "shakespeare.json"));
}

TEST(TrainTokenizer, EncodesAsHuggingFaceDoes) {
  const std::string json = trained(2, {kGolden + "mixed.jsonl"}, {.vocab_size = 700});
  const Tokenizer tokenizer = Tokenizer::from_json(json, "trained");
  EXPECT_EQ(tokenizer.vocab_size(), 700);
  EXPECT_TRUE(tokenizer.is_special(0));
  for (const auto& c : nlohmann::json::parse(content_of(kGolden + "cases.json"))) {
    const auto text = c.at("text").get<std::string>();
    SCOPED_TRACE(text.substr(0, 100));
    const auto ids = tokenizer.encode(text);
    EXPECT_EQ(ids, c.at("ids").get<std::vector<std::int64_t>>());
    EXPECT_EQ(tokenizer.decode(ids), text);
  }
}

TEST(TrainTokenizer, DependsOnNeitherThreadsNorFiles) {
  const Scratch scratch;
  const std::string text = content_of(kShakespeare);
  const std::string once = trained(1, {kShakespeare}, {.vocab_size = 600});
  expect_same_file(trained(3, {kShakespeare}, {.vocab_size = 600}), once);
  // The same documents in two files, the later ones first.
  const std::size_t middle = text.find("\nROMEO", text.size() / 2);
  const auto front = scratch.put("front.txt", text.substr(0, middle));
  const auto back = scratch.put("back.txt", text.substr(middle));
  expect_same_file(trained(3, {back, front}, {.vocab_size = 600}), once);
}

TEST(TrainTokenizer, TakesSpecialTokens) {
  const Scratch scratch;
  const auto text = scratch.put("a.txt", "abc abc\n");
  const auto tokenizer = [&](const std::vector<std::string>& special) {
    return Tokenizer::from_json(trained(1, {text}, {.vocab_size = 260, .special_tokens = special}),
                                "trained");
  };
  EXPECT_EQ(tokenizer({}).token_to_id("!"), 0);
  EXPECT_FALSE(tokenizer({}).is_special(0));
  const Tokenizer two = tokenizer({"<s>", "\"\\\n</s>"});
  EXPECT_EQ(two.token_to_id("<s>"), 0);
  EXPECT_EQ(two.token_to_id("\"\\\n</s>"), 1);
  EXPECT_TRUE(two.is_special(1));
  EXPECT_EQ(two.token_to_id("!"), 2);
  EXPECT_EQ(two.encode("<s>abc"), (std::vector<std::int64_t>{0, 259}));
}

TEST(TrainTokenizer, StopsWhereThereIsNothingToMerge) {
  const Scratch scratch;
  const auto text = scratch.put("a.txt", "ab ab abc");  // ab, " ab", abc
  std::string warning;
  Context ctx({.threads = 1, .log = [&](LogLevel level, std::string_view line) {
                 if (level == LogLevel::warning) warning = line;
               }});
  EXPECT_EQ(train_tokenizer(ctx, {text}, {.vocab_size = 259}).vocab_size, 259);
  EXPECT_EQ(warning, "");
  EXPECT_EQ(train_tokenizer(ctx, {text}, {.vocab_size = 1000}).vocab_size, 260);
  EXPECT_NE(warning.find("260"), std::string::npos) << warning;
  EXPECT_NE(warning.find("1000"), std::string::npos) << warning;
  EXPECT_EQ(train_tokenizer(ctx, {text}, {.vocab_size = 1000, .min_frequency = 2}).vocab_size, 259);
  EXPECT_EQ(train_tokenizer(ctx, {text}, {.vocab_size = 257}).vocab_size, 257);
}

TEST(TrainTokenizer, RepairsInvalidText) {
  const Scratch scratch;
  const auto broken = scratch.put("broken.txt", "a\xFF\xC3 b\xE2\x82");
  const auto repaired = scratch.put("repaired.txt", "a\xEF\xBF\xBD\xEF\xBF\xBD b\xEF\xBF\xBD");
  expect_same_file(trained(1, {broken}, {.vocab_size = 270}), trained(1, {repaired}, {.vocab_size = 270}));
}

TEST(TrainTokenizer, RefusesWrongOptions) {
  const Scratch scratch;
  const auto text = scratch.put("a.txt", "text");
  EXPECT_MESSAGE(trained(1, {text}, {.vocab_size = 256}), "vocabulary size is 256, expected at least 257");
  EXPECT_MESSAGE(trained(1, {text}, {.vocab_size = std::int64_t{1} << 40}), "expected at most 2097152");
  EXPECT_MESSAGE(trained(1, {text}, {.vocab_size = 300, .special_tokens = {"<a>", "<a>"}}),
                 "'<a>' is there twice");
  EXPECT_MESSAGE(trained(1, {text}, {.vocab_size = 300, .special_tokens = {""}}), "is empty");
  EXPECT_MESSAGE(trained(1, {text}, {.vocab_size = 300, .special_tokens = {"\xFF"}}), "UTF-8");
  EXPECT_MESSAGE(trained(1, {text}, {.vocab_size = 300, .special_tokens = {"a"}}), "stands for a byte");
}

TEST(TrainTokenizer, RefusesBadTexts) {
  const Scratch scratch;
  const TokenizerTrainOptions options{.vocab_size = 300};
  const auto text = scratch.put("a.txt", "text");
  const auto expect = [&](const std::filesystem::path& path, std::string_view part) {
    const std::string message = refusal({text, path}, options);
    EXPECT_NE(message.find(path.string() + ": " + std::string(part)), std::string::npos) << message;
  };
  expect(scratch / "nowhere.txt", "cannot be opened");
  expect(scratch.path(), "is a directory");
  expect(scratch.put("empty.txt", ""), "is empty, expected text");
  expect(scratch.put("zero.txt", std::string_view("PK\0\1", 4)), "holds binary data (byte 2 is zero)");
  expect(scratch.put("no.jsonl", "{\"text\": \"a\"}\n\n{\"txt\": \"a\"}\n"), "line 3 has no text");
  expect(scratch.put("number.jsonl", "{\"text\": 5}"), "line 1 has no text");
  expect(scratch.put("array.jsonl", "[\"text\"]"), "line 1 has no text");
  expect(scratch.put("half.jsonl", "{\"text\": \"a\"}\n{\"text\": \"a"), "line 2 is not JSON");
  expect(scratch.put("deep.jsonl", std::string(100000, '[')), "line 1 is nested deeper");
  EXPECT_MESSAGE(trained(1, {scratch.put("blank.jsonl", "\n{\"text\": \"\"}\n \n")}, options),
                 "text is empty");
}

// Of several bad lines the first is named, whoever finds it.
TEST(TrainTokenizer, NamesTheFirstBadLine) {
  const Scratch scratch;
  std::string lines;
  for (int i = 0; i < 40000; ++i)
    lines += i == 20000 || i >= 30000 ? "bad\n" : "{\"text\": \"some words\"}\n";
  const auto path = scratch.put("lines.jsonl", lines);
  for (int i = 0; i < 5; ++i)
    EXPECT_NE(refusal({path}, {.vocab_size = 300}).find("line 20001 is not JSON"), std::string::npos);
}

TEST(TrainTokenizer, CanBeInterrupted) {
  Context ctx({.threads = 2, .cancelled = [] { return true; }});
  try {
    train_tokenizer(ctx, {kShakespeare}, {.vocab_size = 300});
    FAIL() << "was not interrupted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::interrupted);
  }
}

// The definition: count all pairs anew before each merge.
std::vector<std::pair<TokenId, TokenId>> merges_by_counting(
    const std::vector<std::pair<std::string, int>>& words, std::map<char, TokenId> id_of, TokenId next,
    std::size_t rounds) {
  std::vector<std::pair<std::vector<TokenId>, int>> split;
  for (const auto& [word, count] : words) {
    std::vector<TokenId> symbols;
    for (const char c : word) symbols.push_back(id_of.at(c));
    split.emplace_back(symbols, count);
  }
  std::vector<std::pair<TokenId, TokenId>> merges;
  for (; merges.size() < rounds; ++next) {
    std::map<std::pair<TokenId, TokenId>, int> counts;
    for (const auto& [symbols, count] : split)
      for (std::size_t i = 0; i + 1 < symbols.size(); ++i) counts[{symbols[i], symbols[i + 1]}] += count;
    if (counts.empty()) break;
    // The first of the largest: maps are in order of the pairs.
    const auto best = std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) {
                        return a.second < b.second;
                      })->first;
    merges.push_back(best);
    for (auto& [symbols, count] : split) {
      for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
        if (std::pair(symbols[i], symbols[i + 1]) != best) continue;
        symbols[i] = next;
        symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(i) + 1);
      }
    }
  }
  return merges;
}

TEST(BpeTrainer, MergesAsCountingAnewWould) {
  Rng rng(7);
  for (int round = 0; round < 300; ++round) {
    const std::string letters = std::string("abc").substr(0, 1 + rng.next_u32() % 3);
    std::vector<std::pair<std::string, int>> words;
    WordCounts counts;
    for (std::uint32_t i = 0; i < 1 + rng.next_u32() % 10; ++i) {
      std::string word;
      for (std::uint32_t j = 0; j < 1 + rng.next_u32() % 16; ++j)
        word += letters[rng.next_u32() % letters.size()];
      const int count = 1 + static_cast<int>(rng.next_u32() % 20);
      words.emplace_back(word, count);
      counts.add(word, static_cast<std::uint64_t>(count));
    }
    std::string described;
    for (const auto& [word, count] : words) described += word + " " + std::to_string(count) + ", ";
    SCOPED_TRACE(described);
    BpeTrainer trainer(counts, {});
    trainer.train(256 + 40, 1);
    std::map<char, TokenId> id_of;
    for (TokenId id = 0; id < 256; ++id)
      if (trainer.tokens()[id].size() == 1) id_of[trainer.tokens()[id][0]] = id;
    EXPECT_EQ(trainer.merges(), merges_by_counting(words, id_of, 256, 40));
  }
}

}  // namespace
}  // namespace krait
