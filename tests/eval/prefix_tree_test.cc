#include "eval/prefix_tree.h"

#include <gtest/gtest.h>

#include <random>

namespace krait {
namespace {

using Ids = std::vector<std::int64_t>;

std::vector<PrefixNode> tree_of(const std::vector<Ids>& sequences, std::int64_t least, int depth) {
  return prefix_tree(std::vector<std::span<const std::int64_t>>(sequences.begin(), sequences.end()), least,
                     depth);
}

// Puts every sequence together again from its nodes, and returns how many tokens a model would run.
std::int64_t check(const std::vector<Ids>& sequences, const std::vector<PrefixNode>& nodes, int max_depth) {
  std::vector<Ids> built(sequences.size());
  std::vector<std::int64_t> last(sequences.size(), -1);
  std::vector<int> depth(sequences.size(), 0);
  std::int64_t tokens = 0;
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    const PrefixNode& node = nodes[n];
    EXPECT_LT(node.parent, static_cast<std::int64_t>(n));
    EXPECT_LT(node.begin, node.end);
    tokens += node.end - node.begin;
    for (const std::int64_t member : node.members) {
      const auto i = static_cast<std::size_t>(member);
      EXPECT_EQ(node.parent, last[i]);
      EXPECT_EQ(node.begin, std::ssize(built[i]));
      const Ids& from = sequences[static_cast<std::size_t>(node.members.front())];
      built[i].insert(built[i].end(), from.begin() + node.begin, from.begin() + node.end);
      last[i] = static_cast<std::int64_t>(n);
      EXPECT_LE(++depth[i], max_depth + 1);
    }
  }
  EXPECT_EQ(built, sequences);
  return tokens;
}

TEST(PrefixTree, SharesWhatIsLongEnough) {
  const std::vector<Ids> sequences{{1, 2, 3, 4, 5}, {1, 2, 3, 9}, {1, 2, 3, 4, 6, 7}, {8, 8}};
  EXPECT_EQ(check(sequences, tree_of(sequences, 1, 3), 3), 3 + 1 + 1 + 2 + 1 + 2);
  // 1 2 3 is shared and the one token behind it is not.
  EXPECT_EQ(check(sequences, tree_of(sequences, 2, 3), 3), 3 + 2 + 1 + 3 + 2);
  EXPECT_EQ(check(sequences, tree_of(sequences, 4, 3), 3), 4 + 1 + 2 + 4 + 2);
  EXPECT_EQ(check(sequences, tree_of(sequences, 5, 3), 3), 5 + 4 + 6 + 2);
  EXPECT_EQ(check(sequences, tree_of(sequences, 1, 1), 1), 3 + 2 + 1 + 3 + 2);
  EXPECT_EQ(check(sequences, tree_of(sequences, 1, 0), 0), 5 + 4 + 6 + 2);
}

// Two questions of two choices each, which begin with the same two words.
TEST(PrefixTree, KeepsItsDepthForWhatSavesMost) {
  std::vector<Ids> sequences;
  for (std::int64_t question = 0; question < 2; ++question)
    for (std::int64_t choice = 0; choice < 2; ++choice) {
      Ids& ids = sequences.emplace_back(Ids{1, 2});
      ids.resize(12, 10 + question);
      ids.push_back(choice);
    }
  EXPECT_EQ(check(sequences, tree_of(sequences, 2, 1), 1), 2 * 12 + 4);
  for (Ids& ids : sequences) ids.erase(ids.begin() + 7, ids.begin() + 12);  // now two are a quarter
  EXPECT_EQ(check(sequences, tree_of(sequences, 2, 2), 2), 2 + 2 * 5 + 4);
}

TEST(PrefixTree, EqualSequencesAndBeginnings) {
  const std::vector<Ids> equal{{1, 2}, {3}, {1, 2}, {1, 2}};
  EXPECT_EQ(check(equal, tree_of(equal, 8, 0), 0), 3);
  std::vector<Ids> chain;
  for (std::int64_t n = 1; n <= 50; ++n) chain.emplace_back(static_cast<std::size_t>(n), 7);
  check(chain, tree_of(chain, 1, 3), 3);
  check(chain, tree_of(chain, 8, 100), 100);
  EXPECT_TRUE(prefix_tree({}, 1, 3).empty());
}

TEST(PrefixTree, RandomSequences) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<Ids> sequences(1 + random() % 12);
    std::int64_t all = 0;
    for (Ids& ids : sequences) {
      ids.resize(1 + random() % 10);
      for (std::int64_t& id : ids) id = random() % 2;
      all += std::ssize(ids);
    }
    const auto least = static_cast<std::int64_t>(1 + random() % 4);
    const auto depth = static_cast<int>(random() % 4);
    EXPECT_LE(check(sequences, tree_of(sequences, least, depth), depth), all);
  }
}

}  // namespace
}  // namespace krait
