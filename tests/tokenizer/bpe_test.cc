#include "tokenizer/bpe.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "krait/core/random.h"

namespace krait::tokenizer {
namespace {

using Ids = std::vector<std::int64_t>;

// Random merges over a few letters: many ties, overlaps and pairs that come up again.
struct RandomBpe {
  explicit RandomBpe(Rng& rng) {
    std::vector<std::string> tokens = {"a", "b", "c", "\xE2\x96\x81"};
    std::map<std::string, TokenId> ids;
    Vocabulary vocabulary;
    const auto add = [&](const std::string& token) {
      if (!ids.emplace(token, static_cast<TokenId>(ids.size())).second) return;
      vocabulary.add(token, ids.at(token), "test");
    };
    for (const auto& token : tokens) add(token);
    add("<unk>");
    MergeList list;
    for (int i = 0; i < 30; ++i) {
      const std::string left = tokens[rng.next_u32() % tokens.size()];
      const std::string right = tokens[rng.next_u32() % tokens.size()];
      if ((left + right).size() > 12) continue;
      add(left + right);
      tokens.push_back(left + right);
      list.add(left, right);
      merges[{ids.at(left), ids.at(right)}] = {list.size() - 1, ids.at(left + right)};
    }
    letters = {{'a', ids.at("a")}, {'b', ids.at("b")}, {'c', ids.at("c")}, {'_', ids.at("\xE2\x96\x81")}};
    vocabulary.index("test");
    BpeOptions options;
    options.unk_token = "<unk>";
    bpe = std::make_unique<Bpe>(std::move(vocabulary), list, options, "test");
  }

  // By definition: merge the pair of lowest rank, leftmost first, until there is none.
  Ids by_definition(const std::string& text) const {
    Ids ids;
    for (const char c : text) ids.push_back(letters.at(c));
    while (true) {
      std::size_t best = 0;
      std::size_t rank = merges_end;
      TokenId merged = 0;
      for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
        const auto at = merges.find({static_cast<TokenId>(ids[i]), static_cast<TokenId>(ids[i + 1])});
        if (at == merges.end() || at->second.first >= rank) continue;
        best = i;
        rank = at->second.first;
        merged = at->second.second;
      }
      if (rank == merges_end) return ids;
      ids[best] = merged;
      ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
  }

  static constexpr std::size_t merges_end = 1000;
  std::map<std::pair<TokenId, TokenId>, std::pair<std::size_t, TokenId>> merges;
  std::map<char, TokenId> letters;
  std::unique_ptr<Bpe> bpe;
};

TEST(Bpe, EqualsItsDefinition) {
  Rng rng(7);
  for (int round = 0; round < 60; ++round) {
    const RandomBpe random(rng);
    Bpe::Workspace workspace;
    // Lengths on both sides of where the heap takes over, each twice so that the cache answers too.
    for (const int length : {0, 1, 2, 3, 5, 8, 13, 28, 29, 30, 39, 40, 41, 42, 80, 200}) {
      std::string text;
      std::string spelled;
      for (int i = 0; i < length; ++i) {
        const char c = "abc_"[rng.next_u32() % 4];
        text.push_back(c);
        spelled += c == '_' ? std::string("\xE2\x96\x81") : std::string(1, c);
      }
      SCOPED_TRACE(text);
      const Ids expected = random.by_definition(text);
      for (int time = 0; time < 2; ++time) {
        Ids ids;
        random.bpe->encode(spelled, workspace, ids);
        ASSERT_EQ(ids, expected);
      }
    }
  }
}

TEST(Vocabulary, FindsWhatWasAdded) {
  Vocabulary vocabulary;
  for (int i = 0; i < 3000; ++i) vocabulary.add("token" + std::to_string(i), i * 2, "test");
  vocabulary.add("", 1, "test");
  vocabulary.index("test");
  EXPECT_EQ(vocabulary.size(), 5999);
  for (int i = 0; i < 3000; ++i) {
    EXPECT_EQ(vocabulary.find("token" + std::to_string(i)), static_cast<TokenId>(i * 2));
    EXPECT_EQ(vocabulary.token(static_cast<TokenId>(i * 2)), "token" + std::to_string(i));
  }
  EXPECT_EQ(vocabulary.find(""), 1U);
  EXPECT_EQ(vocabulary.find("token3000"), std::nullopt);
  EXPECT_TRUE(vocabulary.contains(1));
  EXPECT_FALSE(vocabulary.contains(3));
  EXPECT_FALSE(vocabulary.contains(5999));
  EXPECT_FALSE(vocabulary.contains(-1));
}

}  // namespace
}  // namespace krait::tokenizer
