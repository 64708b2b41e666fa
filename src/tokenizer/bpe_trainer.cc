#include "tokenizer/bpe_trainer.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include "krait/core/error.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/unicode.h"

namespace krait::tokenizer {
namespace {

constexpr std::size_t kFirstSlots = std::size_t{1} << 16;

std::uint64_t pair_of(TokenId left, TokenId right) { return (std::uint64_t{left} << 32) | right; }
TokenId left_of(std::uint64_t pair) { return static_cast<TokenId>(pair >> 32); }
TokenId right_of(std::uint64_t pair) { return static_cast<TokenId>(pair); }

std::size_t hash_of_pair(std::uint64_t pair) {
  const std::uint64_t hash = pair * 0x9E3779B97F4A7C15U;
  return hash ^ (hash >> 32);
}

}  // namespace

BpeTrainer::BpeTrainer(const WordCounts& words, const std::vector<std::string>& special_tokens) {
  for (const std::string& token : special_tokens) add_token(token);
  std::array<unsigned char, 256> bytes{};
  std::iota(bytes.begin(), bytes.end(), static_cast<unsigned char>(0));
  std::sort(bytes.begin(), bytes.end(),
            [](unsigned char a, unsigned char b) { return character_of_byte(a) < character_of_byte(b); });
  std::vector<TokenId> id_of_byte(bytes.size());
  for (const unsigned char byte : bytes) {
    std::string character;
    append_utf8(character, character_of_byte(byte));
    id_of_byte[byte] = add_token(character);
  }
  for (std::size_t i = 0; i < words.size(); ++i) add_word(words.word(i), words.count(i), id_of_byte);
  count_pairs();
}

// A merge may spell a special token: then they are one.
TokenId BpeTrainer::add_token(const std::string& token) {
  const auto [at, is_new] = id_of_token_.emplace(token, static_cast<TokenId>(tokens_.size()));
  if (is_new) tokens_.push_back(token);
  return at->second;
}

void BpeTrainer::add_word(std::string_view word, std::uint64_t count,
                          const std::vector<TokenId>& id_of_byte) {
  if (word.size() < 2) return;  // nothing to merge
  words_.push_back(
      {.begin = symbols_.size(), .length = word.size(), .count = static_cast<std::int64_t>(count)});
  for (const char c : word) symbols_.push_back(id_of_byte[static_cast<unsigned char>(c)]);
}

void BpeTrainer::count_pairs() {
  for (std::size_t i = 0; i < words_.size(); ++i) {
    const Word& word = words_[i];
    const TokenId* symbols = &symbols_[word.begin];
    for (std::size_t j = 0; j + 1 < word.length; ++j)
      come_up(pair_of(symbols[j], symbols[j + 1]), word.count, static_cast<WordIndex>(i));
  }
  queue_new();
}

void BpeTrainer::grow_slots() {
  slots_.assign(slots_.empty() ? kFirstSlots : 2 * slots_.size(), 0);
  const std::size_t mask = slots_.size() - 1;
  for (std::size_t i = 0; i < pairs_.size(); ++i) {
    std::size_t at = hash_of_pair(pairs_[i].pair) & mask;
    while (slots_[at] != 0) at = (at + 1) & mask;
    slots_[at] = static_cast<std::uint32_t>(i + 1);
  }
}

BpeTrainer::PairCount& BpeTrainer::find(Pair pair) {
  if (2 * (pairs_.size() + 1) > slots_.size()) grow_slots();
  const std::size_t mask = slots_.size() - 1;
  std::size_t at = hash_of_pair(pair) & mask;
  for (; slots_[at] != 0; at = (at + 1) & mask) {
    PairCount& found = pairs_[slots_[at] - 1];
    if (found.pair == pair) return found;
  }
  require(pairs_.size() < std::numeric_limits<std::uint32_t>::max(), "[tokenizer] the text has more than ",
          pairs_.size(), " different pairs");
  pairs_.push_back({.pair = pair});
  slots_[at] = static_cast<std::uint32_t>(pairs_.size());
  return pairs_.back();
}

void BpeTrainer::change(Pair pair, std::int64_t by) { find(pair).count += by; }

void BpeTrainer::come_up(Pair pair, std::int64_t by, WordIndex word) {
  PairCount& found = find(pair);
  found.count += by;
  // Words come one after the other, so that one that is there already is the last.
  if (found.words.empty() || found.words.back() != word) found.words.push_back(word);
}

void BpeTrainer::queue_new() {
  for (; queued_ < pairs_.size(); ++queued_) {
    queue_.push_back({.count = pairs_[queued_].count, .pair = pairs_[queued_].pair});
    std::push_heap(queue_.begin(), queue_.end());
  }
}

BpeTrainer::Candidate BpeTrainer::take_best() {
  std::pop_heap(queue_.begin(), queue_.end());
  const Candidate best = queue_.back();
  queue_.pop_back();
  return best;
}

void BpeTrainer::train(std::size_t vocab_size, std::int64_t min_frequency) {
  while (tokens_.size() < vocab_size && !queue_.empty()) {
    const Candidate best = take_best();
    PairCount& pair = find(best.pair);
    if (pair.count < std::max<std::int64_t>(min_frequency, 1)) continue;
    if (pair.count < best.count) {
      queue_.push_back({.count = pair.count, .pair = best.pair});
      std::push_heap(queue_.begin(), queue_.end());
      continue;
    }
    const TokenId left = left_of(best.pair);
    const TokenId right = right_of(best.pair);
    const TokenId joined = add_token(tokens_[left] + tokens_[right]);
    merges_.emplace_back(left, right);
    const std::vector<WordIndex> words = std::move(pair.words);
    for (const WordIndex word : words) merge_in_word(word, left, right, joined);
    queue_new();
  }
}

// Replaces each (left, right) by `joined`, from the left, and counts the pairs that go and come.
void BpeTrainer::merge_in_word(WordIndex index, TokenId left, TokenId right, TokenId joined) {
  Word& word = words_[index];
  TokenId* symbols = &symbols_[word.begin];
  std::size_t length = 0;
  for (std::size_t i = 0; i < word.length; ++i) {
    if (symbols[i] != left || i + 1 == word.length || symbols[i + 1] != right) {
      symbols[length++] = symbols[i];
      continue;
    }
    if (length > 0) {
      change(pair_of(symbols[length - 1], left), -word.count);
      come_up(pair_of(symbols[length - 1], joined), word.count, index);
    }
    ++i;
    if (i + 1 < word.length) {
      change(pair_of(right, symbols[i + 1]), -word.count);
      come_up(pair_of(joined, symbols[i + 1]), word.count, index);
    }
    symbols[length++] = joined;
  }
  word.length = length;
}

}  // namespace krait::tokenizer
