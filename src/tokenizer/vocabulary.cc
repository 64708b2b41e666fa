#include "tokenizer/vocabulary.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "krait/core/error.h"
#include "tokenizer/unicode.h"

namespace krait::tokenizer {
namespace {

std::uint64_t fold(std::uint64_t x) {
  x *= 0x9E3779B97F4A7C15U;
  return x ^ (x >> 29);
}

}  // namespace

std::uint64_t hash_of(std::string_view text) {
  std::uint64_t hash = text.size();
  const char* at = text.data();
  std::size_t left = text.size();
  for (; left >= 8; left -= 8, at += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, at, 8);
    hash = fold(hash ^ word);
  }
  std::uint64_t word = 0;
  for (std::size_t i = 0; i < left; ++i) {
    word |= static_cast<std::uint64_t>(static_cast<unsigned char>(at[i])) << (8 * i);
  }
  hash = fold(hash ^ word);
  return fold(hash);
}

void Vocabulary::add(std::string_view token, std::int64_t id, std::string_view where) {
  if (id < 0 || id >= kMaxVocabulary) {
    fail(ErrorKind::invalid_argument, where, ": the token ", in_quotes(token), " has id ", id,
         ", expected one from 0 to ", kMaxVocabulary - 1);
  }
  require(text_.size() + token.size() < kAbsent, where, ": the vocabulary exceeds 4 GiB");
  entries_.push_back({{static_cast<std::uint32_t>(text_.size()), static_cast<std::uint32_t>(token.size())},
                      static_cast<TokenId>(id)});
  text_.append(token);
}

void Vocabulary::index(std::string_view where) {
  TokenId largest = 0;
  for (const Entry& entry : entries_) largest = std::max(largest, entry.id);
  by_id_.assign(entries_.empty() ? 0 : std::size_t{largest} + 1, Text{});
  slots_.assign(std::bit_ceil(2 * entries_.size() + 1), Slot{});
  const std::size_t mask = slots_.size() - 1;
  for (const Entry& entry : entries_) {
    Text& place = by_id_[entry.id];
    if (place.offset != kAbsent) {
      fail(ErrorKind::invalid_argument, where, ": the tokens ", in_quotes(view(place)), " and ",
           in_quotes(view(entry.text)), " have the same id ", entry.id);
    }
    place = entry.text;
    const std::string_view token = view(entry.text);
    const std::uint64_t hash = hash_of(token);
    const auto tag = static_cast<std::uint32_t>(hash >> 32);
    std::size_t at = hash & mask;
    for (; slots_[at].id_plus_one != 0; at = (at + 1) & mask) {
      if (slots_[at].tag == tag && this->token(slots_[at].id_plus_one - 1) == token) {
        fail(ErrorKind::invalid_argument, where, ": the token ", in_quotes(token), " occurs twice");
      }
    }
    slots_[at] = {tag, entry.id + 1};
  }
  entries_ = {};
}

std::optional<TokenId> Vocabulary::find(std::string_view token) const {
  if (slots_.empty()) return std::nullopt;
  const std::size_t mask = slots_.size() - 1;
  const std::uint64_t hash = hash_of(token);
  const auto tag = static_cast<std::uint32_t>(hash >> 32);
  for (std::size_t at = hash & mask; slots_[at].id_plus_one != 0; at = (at + 1) & mask) {
    const TokenId id = slots_[at].id_plus_one - 1;
    if (slots_[at].tag == tag && this->token(id) == token) return id;
  }
  return std::nullopt;
}

}  // namespace krait::tokenizer
