// Byte-pair encoding of one piece of text: the symbols of a piece are merged pair by pair, always the
// pair of lowest rank, leftmost first, until no neighbours form a known pair.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/json_file.h"
#include "tokenizer/vocabulary.h"

namespace krait::tokenizer {

struct BpeOptions {
  std::optional<std::string> unk_token;  // stands for characters outside the vocabulary; else they vanish
  bool fuse_unk = false;                 // neighbouring unknown characters share one unk_token
  bool byte_fallback = false;  // unknown characters become the tokens <0x00> to <0xFF> of their bytes
  bool ignore_merges = false;  // a piece that is a token is that token, whatever the merges say
  // Pieces are bytes to be read through the byte alphabet (see byte_alphabet.h), not characters.
  bool byte_level = false;
};

class Bpe {
 public:
  // Working memory and a cache of encoded pieces; one thread uses it at a time.
  class Workspace;

  // Throws Error(invalid_argument), beginning with `where`, for merges of or to unknown tokens.
  Bpe(Vocabulary vocabulary, const MergeList& merges, BpeOptions options, std::string_view where);

  [[nodiscard]] const Vocabulary& vocabulary() const { return vocabulary_; }

  // Appends the ids of `piece`. Throws Error(invalid_argument) where unk_token is needed and unknown.
  void encode(std::string_view piece, Workspace& workspace, std::vector<std::int64_t>& ids) const;

 private:
  struct Merge {
    std::uint32_t rank = kNoRank;
    TokenId id = 0;
  };
  struct MergeSlot {
    std::uint64_t pair = kNoPair;
    Merge merge;
  };
  static constexpr std::uint32_t kNoRank = 0xFFFFFFFF;
  static constexpr std::uint64_t kNoPair = ~std::uint64_t{0};

  void index_merges(const MergeList& merges);
  void index_symbols();
  [[nodiscard]] bool merges_cross_word_starts() const;
  [[nodiscard]] Merge merge_of(TokenId left, TokenId right) const;

  void encode_word(std::string_view word, Workspace& workspace, std::vector<std::int64_t>& ids) const;
  void encode_uncached(std::string_view word, Workspace& workspace) const;
  void bytes_to_symbols(std::string_view word, std::vector<TokenId>& symbols) const;
  void characters_to_symbols(std::string_view word, std::vector<TokenId>& symbols) const;
  void merge_short(Workspace& workspace) const;
  void merge_long(Workspace& workspace) const;

  Vocabulary vocabulary_;
  BpeOptions options_;
  std::string where_;
  std::vector<MergeSlot> merges_;
  // The symbol of each byte (byte_level) or ASCII character, where there is one.
  std::array<std::optional<TokenId>, 256> symbol_of_byte_;
  std::array<std::optional<TokenId>, 256> fallback_of_byte_;
  std::optional<TokenId> unk_;
  // No merge makes a U+2581 after another character, and no character vanishes and so lets its neighbours
  // meet: a piece may be cut before a U+2581 that follows another character.
  bool cut_at_word_starts_ = false;
};

class Bpe::Workspace {
 private:
  friend class Bpe;

  // A direct-mapped cache of short pieces. Bounded, and nothing has to be searched.
  struct CacheLine {
    static constexpr std::size_t kKey = 29;
    static constexpr std::size_t kIds = 8;
    std::uint8_t key_length = 0;  // 0: empty
    std::uint8_t id_count = 0;
    std::array<char, kKey + 1> key{};
    std::array<TokenId, kIds> ids{};
  };
  static constexpr std::size_t kLines = std::size_t{1} << 14;

  struct Node {
    TokenId id = 0;
    std::uint32_t previous = 0;
    std::uint32_t next = 0;
    bool gone = false;
  };

  std::vector<CacheLine> cache_;  // kLines, from the first piece on
  std::vector<TokenId> symbols_;
  std::vector<Merge> candidates_;
  std::vector<Node> nodes_;
  std::vector<std::uint64_t> heap_;
  std::string spelled_;
};

}  // namespace krait::tokenizer
