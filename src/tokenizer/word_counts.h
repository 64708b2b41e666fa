// How often each word occurs: a hash table in flat memory, made to hold millions of short words.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace krait::tokenizer {

class WordCounts {
 public:
  void add(std::string_view word, std::uint64_t count = 1);
  // Adds all counts of `other`.
  void add(const WordCounts& other);

  // Distinct words, numbered in the order in which they came first.
  [[nodiscard]] std::size_t size() const { return words_.size(); }
  [[nodiscard]] std::string_view word(std::size_t i) const {
    return std::string_view(text_).substr(words_[i].offset, words_[i].length);
  }
  [[nodiscard]] std::uint64_t count(std::size_t i) const { return words_[i].count; }

 private:
  struct Word {
    std::uint64_t offset = 0;
    std::uint64_t length = 0;
    std::uint64_t count = 0;
  };
  struct Slot {
    std::uint32_t tag = 0;  // upper half of the hash: spares most comparisons
    std::uint32_t index_plus_one = 0;
  };

  void grow();
  [[nodiscard]] Slot& slot_of(std::string_view word, std::uint64_t hash);

  std::string text_;
  std::vector<Word> words_;
  std::vector<Slot> slots_;  // a power of two, at most half full
};

}  // namespace krait::tokenizer
