#include "tokenizer/word_counts.h"

#include <limits>

#include "krait/core/error.h"
#include "tokenizer/vocabulary.h"

namespace krait::tokenizer {
namespace {

constexpr std::size_t kFirstSlots = 1024;

std::uint32_t tag_of(std::uint64_t hash) { return static_cast<std::uint32_t>(hash >> 32); }

}  // namespace

// The slot of `word`, or the empty one where it belongs.
WordCounts::Slot& WordCounts::slot_of(std::string_view text, std::uint64_t hash) {
  const std::size_t mask = slots_.size() - 1;
  for (std::size_t at = hash & mask;; at = (at + 1) & mask) {
    Slot& slot = slots_[at];
    if (slot.index_plus_one == 0) return slot;
    if (slot.tag == tag_of(hash) && word(slot.index_plus_one - 1) == text) return slot;
  }
}

void WordCounts::grow() {
  std::vector<Slot> old = std::move(slots_);
  slots_.assign(old.empty() ? kFirstSlots : 2 * old.size(), Slot{});
  const std::size_t mask = slots_.size() - 1;
  for (const Slot& slot : old) {
    if (slot.index_plus_one == 0) continue;
    std::size_t at = hash_of(word(slot.index_plus_one - 1)) & mask;
    while (slots_[at].index_plus_one != 0) at = (at + 1) & mask;
    slots_[at] = slot;
  }
}

void WordCounts::add(std::string_view text, std::uint64_t count) {
  if (2 * (words_.size() + 1) > slots_.size()) grow();
  const std::uint64_t hash = hash_of(text);
  Slot& slot = slot_of(text, hash);
  if (slot.index_plus_one != 0) {
    words_[slot.index_plus_one - 1].count += count;
    return;
  }
  require(words_.size() < std::numeric_limits<std::uint32_t>::max(), "[tokenizer] the text has more than ",
          words_.size(), " different words");
  words_.push_back({.offset = text_.size(), .length = text.size(), .count = count});
  text_ += text;
  slot = {.tag = tag_of(hash), .index_plus_one = static_cast<std::uint32_t>(words_.size())};
}

void WordCounts::add(const WordCounts& other) {
  for (std::size_t i = 0; i < other.size(); ++i) add(other.word(i), other.count(i));
}

}  // namespace krait::tokenizer
