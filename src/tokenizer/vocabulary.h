// The model's vocabulary: token to id and back, in flat memory.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace krait::tokenizer {

using TokenId = std::uint32_t;

// Ids must lie below this: the table by id is dense, and a file must not ask for gigabytes.
inline constexpr std::int64_t kMaxVocabulary = std::int64_t{1} << 21;

// A hash of short strings: eight bytes at a time, multiplied and folded.
[[nodiscard]] std::uint64_t hash_of(std::string_view text);

class Vocabulary {
 public:
  // Collects a token. Throws Error(invalid_argument), beginning with `where`, where the id is negative
  // or absurd.
  void add(std::string_view token, std::int64_t id, std::string_view where);
  // Makes find and token usable. Throws Error(invalid_argument), beginning with `where`, where a token
  // or an id occurs twice.
  void index(std::string_view where);

  [[nodiscard]] std::optional<TokenId> find(std::string_view token) const;
  // True for an id that a token has.
  [[nodiscard]] bool contains(std::int64_t id) const {
    return id >= 0 && id < size() && by_id_[static_cast<std::size_t>(id)].offset != kAbsent;
  }
  [[nodiscard]] std::string_view token(TokenId id) const { return view(by_id_[id]); }
  // The largest id plus one.
  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(by_id_.size()); }

 private:
  static constexpr std::uint32_t kAbsent = 0xFFFFFFFF;
  struct Text {
    std::uint32_t offset = kAbsent;
    std::uint32_t length = 0;
  };
  struct Entry {
    Text text;
    TokenId id = 0;
  };
  struct Slot {
    std::uint32_t tag = 0;  // upper half of the hash: spares most comparisons
    std::uint32_t id_plus_one = 0;
  };

  [[nodiscard]] std::string_view view(Text text) const {
    return std::string_view(text_).substr(text.offset, text.length);
  }

  std::string text_;
  std::vector<Entry> entries_;  // until index()
  std::vector<Text> by_id_;
  std::vector<Slot> slots_;
};

}  // namespace krait::tokenizer
