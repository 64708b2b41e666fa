// Learning the merges of byte-pair encoding: the most frequent pair of neighbouring symbols becomes a new
// symbol, again and again. Each round costs what the words that hold the pair cost, not what the text does.
//
// A string becomes a symbol in one round only and by one pair: what happens inside of a string that ends up
// as one symbol depends on nothing outside of it. So a pair comes up in the round that makes one of its
// symbols (the alphabet's: at the start) and at no new place later.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tokenizer/vocabulary.h"
#include "tokenizer/word_counts.h"

namespace krait::tokenizer {

class BpeTrainer {
 public:
  // Token ids begin with `special_tokens`; then come the bytes, in the order of the byte alphabet's
  // characters. The special tokens differ from each other and from those characters.
  BpeTrainer(const WordCounts& words, const std::vector<std::string>& special_tokens);

  // Merges until there are `vocab_size` tokens, or no pair occurs `min_frequency` times.
  void train(std::size_t vocab_size, std::int64_t min_frequency);

  // Every token as tokenizer.json spells it, by id.
  [[nodiscard]] const std::vector<std::string>& tokens() const { return tokens_; }
  // Pairs of ids, best first.
  [[nodiscard]] const std::vector<std::pair<TokenId, TokenId>>& merges() const { return merges_; }

 private:
  using WordIndex = std::uint32_t;
  // Left id in the upper half, right id in the lower: as numbers, pairs are in the order that breaks ties.
  using Pair = std::uint64_t;

  struct PairCount {
    Pair pair = 0;
    std::int64_t count = 0;
    std::vector<WordIndex> words;  // where it came up; it may be gone from some
  };
  // Counts only fall once a pair is queued: an entry that is taken with an old count goes back with the new
  // one.
  struct Candidate {
    std::int64_t count = 0;
    Pair pair = 0;
    [[nodiscard]] bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };

  TokenId add_token(const std::string& token);
  void add_word(std::string_view word, std::uint64_t count, const std::vector<TokenId>& id_of_byte);
  void count_pairs();
  PairCount& find(Pair pair);
  void grow_slots();
  void change(Pair pair, std::int64_t by);
  void come_up(Pair pair, std::int64_t by, WordIndex word);
  void queue_new();
  Candidate take_best();
  void merge_in_word(WordIndex word, TokenId left, TokenId right, TokenId joined);

  std::vector<std::string> tokens_;
  std::unordered_map<std::string, TokenId> id_of_token_;
  std::vector<std::pair<TokenId, TokenId>> merges_;

  // The words, each a stretch of symbols that merging shortens.
  struct Word {
    std::uint64_t begin = 0;
    std::uint64_t length = 0;
    std::int64_t count = 0;
  };
  std::vector<TokenId> symbols_;
  std::vector<Word> words_;

  std::vector<PairCount> pairs_;
  std::vector<std::uint32_t> slots_;  // hash table over pairs_: index plus one; at most half full
  std::size_t queued_ = 0;            // those of pairs_ that have been queued
  std::vector<Candidate> queue_;      // a heap, the best first
};

}  // namespace krait::tokenizer
