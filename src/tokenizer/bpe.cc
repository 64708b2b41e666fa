#include "tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <utility>

#include "krait/core/error.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/unicode.h"

namespace krait::tokenizer {
namespace {

constexpr std::string_view kWordStart = "\xE2\x96\x81";  // U+2581, SentencePiece's visible space
// Up to here scanning for the best pair is quicker than a heap.
constexpr std::size_t kShort = 40;

std::uint64_t pair_of(TokenId left, TokenId right) { return (std::uint64_t{left} << 32) | right; }

std::size_t slot_of(std::uint64_t pair, std::size_t mask) {
  const std::uint64_t hash = pair * 0x9E3779B97F4A7C15U;
  return (hash ^ (hash >> 32)) & mask;
}

// The next place at or after `from` where U+2581 follows another character, or npos.
std::size_t next_word_start(std::string_view text, std::size_t from) {
  for (std::size_t at = text.find(kWordStart, from); at != std::string_view::npos;
       at = text.find(kWordStart, at + kWordStart.size())) {
    if (at > 0 && !text.substr(0, at).ends_with(kWordStart)) return at;
  }
  return std::string_view::npos;
}

std::string fallback_token(unsigned byte) {
  constexpr std::string_view kHex = "0123456789ABCDEF";
  return {'<', '0', 'x', kHex[byte >> 4U], kHex[byte & 15U], '>'};
}

}  // namespace

Bpe::Bpe(Vocabulary vocabulary, const MergeList& merges, BpeOptions options, std::string_view where)
    : vocabulary_(std::move(vocabulary)), options_(std::move(options)), where_(where) {
  index_merges(merges);
  index_symbols();
  const bool keeps_characters =
      unk_.has_value() || std::all_of(fallback_of_byte_.begin(), fallback_of_byte_.end(),
                                      [](const auto& id) { return id.has_value(); });
  cut_at_word_starts_ = !options_.byte_level && !options_.ignore_merges && keeps_characters &&
                        vocabulary_.find(kWordStart) && !merges_cross_word_starts();
}

void Bpe::index_merges(const MergeList& merges) {
  require(merges.size() < kNoRank, where_, ": there are ", merges.size(), " merges");
  merges_.assign(std::bit_ceil(2 * merges.size() + 1), MergeSlot{});
  const std::size_t mask = merges_.size() - 1;
  TokenId next = 0;  // trained vocabularies number the merged tokens in order
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const auto id_of = [&](std::string_view token) {
      const auto id = vocabulary_.find(token);
      if (!id) {
        fail(ErrorKind::invalid_argument, where_, ": merge ", rank, " of ", in_quotes(merges.left(rank)),
             " and ", in_quotes(merges.right(rank)), " needs the token ", in_quotes(token),
             ", which is not in the vocabulary");
      }
      return *id;
    };
    const std::uint64_t pair = pair_of(id_of(merges.left(rank)), id_of(merges.right(rank)));
    std::size_t at = slot_of(pair, mask);
    while (merges_[at].pair != kNoPair && merges_[at].pair != pair) at = (at + 1) & mask;
    const std::string_view joined = merges.joined(rank);
    const bool as_expected = vocabulary_.contains(next) && vocabulary_.token(next) == joined;
    const TokenId id = as_expected ? next : id_of(joined);
    next = id + 1;
    // The last of several equal merges counts.
    merges_[at] = {pair, {static_cast<std::uint32_t>(rank), id}};
  }
}

void Bpe::index_symbols() {
  for (unsigned byte = 0; byte < 256; ++byte) {
    std::string symbol;
    if (options_.byte_level) {
      append_utf8(symbol, character_of_byte(static_cast<unsigned char>(byte)));
    } else if (byte < 0x80) {
      symbol.push_back(static_cast<char>(byte));
    }
    symbol_of_byte_[byte] = vocabulary_.find(symbol);
    if (options_.byte_fallback) fallback_of_byte_[byte] = vocabulary_.find(fallback_token(byte));
  }
  if (options_.unk_token) unk_ = vocabulary_.find(*options_.unk_token);
}

bool Bpe::merges_cross_word_starts() const {
  return std::any_of(merges_.begin(), merges_.end(), [&](const MergeSlot& slot) {
    return slot.pair != kNoPair &&
           next_word_start(vocabulary_.token(slot.merge.id), 0) != std::string_view::npos;
  });
}

Bpe::Merge Bpe::merge_of(TokenId left, TokenId right) const {
  const std::size_t mask = merges_.size() - 1;
  const std::uint64_t pair = pair_of(left, right);
  for (std::size_t at = slot_of(pair, mask);; at = (at + 1) & mask) {
    if (merges_[at].pair == pair) return merges_[at].merge;
    if (merges_[at].pair == kNoPair) return {};
  }
}

void Bpe::encode(std::string_view piece, Workspace& workspace, std::vector<std::int64_t>& ids) const {
  if (cut_at_word_starts_) {
    for (std::size_t cut = next_word_start(piece, 0); cut != std::string_view::npos;
         cut = next_word_start(piece, 0)) {
      encode_word(piece.substr(0, cut), workspace, ids);
      piece.remove_prefix(cut);
    }
  }
  encode_word(piece, workspace, ids);
}

void Bpe::encode_word(std::string_view word, Workspace& workspace, std::vector<std::int64_t>& ids) const {
  using CacheLine = Workspace::CacheLine;
  if (word.empty()) return;
  if (word.size() > CacheLine::kKey) {
    encode_uncached(word, workspace);
    ids.insert(ids.end(), workspace.symbols_.begin(), workspace.symbols_.end());
    return;
  }
  if (workspace.cache_.empty()) workspace.cache_.resize(Workspace::kLines);
  CacheLine& line = workspace.cache_[hash_of(word) % Workspace::kLines];
  if (std::string_view(line.key.data(), line.key_length) != word) {
    encode_uncached(word, workspace);
    const std::vector<TokenId>& symbols = workspace.symbols_;
    if (symbols.size() > CacheLine::kIds) {
      ids.insert(ids.end(), symbols.begin(), symbols.end());
      return;
    }
    line.key_length = static_cast<std::uint8_t>(word.size());
    line.id_count = static_cast<std::uint8_t>(symbols.size());
    std::copy(word.begin(), word.end(), line.key.begin());
    std::copy(symbols.begin(), symbols.end(), line.ids.begin());
  }
  ids.insert(ids.end(), line.ids.begin(), line.ids.begin() + line.id_count);
}

// Leaves the ids of `word` in workspace.symbols_.
void Bpe::encode_uncached(std::string_view word, Workspace& workspace) const {
  std::vector<TokenId>& symbols = workspace.symbols_;
  symbols.clear();
  if (options_.ignore_merges) {
    std::string_view spelled = word;
    if (options_.byte_level) {
      workspace.spelled_.clear();
      append_byte_characters(workspace.spelled_, word);
      spelled = workspace.spelled_;
    }
    if (const auto id = vocabulary_.find(spelled)) {
      symbols.push_back(*id);
      return;
    }
  }
  if (options_.byte_level) {
    bytes_to_symbols(word, symbols);
  } else {
    characters_to_symbols(word, symbols);
  }
  if (symbols.size() < 2) return;
  if (symbols.size() <= kShort) {
    merge_short(workspace);
  } else {
    merge_long(workspace);
  }
}

void Bpe::bytes_to_symbols(std::string_view word, std::vector<TokenId>& symbols) const {
  for (const char byte : word) {
    const auto id = symbol_of_byte_[static_cast<unsigned char>(byte)];
    if (id) symbols.push_back(*id);
  }
}

// Hugging Face's order exactly: an unknown character waits, to be fused with the next, until a known one
// comes, and the tokens of byte_fallback do not make it give way.
void Bpe::characters_to_symbols(std::string_view word, std::vector<TokenId>& symbols) const {
  bool unknown_waits = false;
  for (std::size_t i = 0; i < word.size();) {
    const std::size_t length = code_point_at(word, i).length;
    const std::string_view character = word.substr(i, length);
    const auto id =
        length == 1 ? symbol_of_byte_[static_cast<unsigned char>(word[i])] : vocabulary_.find(character);
    i += length;
    if (id) {
      if (unknown_waits) symbols.push_back(*unk_);
      unknown_waits = false;
      symbols.push_back(*id);
      continue;
    }
    const auto fallback = [&](char byte) { return fallback_of_byte_[static_cast<unsigned char>(byte)]; };
    if (options_.byte_fallback && std::all_of(character.begin(), character.end(),
                                              [&](char byte) { return fallback(byte).has_value(); })) {
      for (const char byte : character) symbols.push_back(*fallback(byte));
      continue;
    }
    if (!options_.unk_token) continue;
    if (!unk_) {
      fail(ErrorKind::invalid_argument, where_, ": ", in_quotes(character),
           " is not in the vocabulary, and neither is the unk_token ", in_quotes(*options_.unk_token));
    }
    if (unknown_waits && !options_.fuse_unk) symbols.push_back(*unk_);
    unknown_waits = true;
  }
  if (unknown_waits) symbols.push_back(*unk_);
}

// candidates_[i] is the merge of symbols i and i + 1.
void Bpe::merge_short(Workspace& workspace) const {
  std::vector<TokenId>& symbols = workspace.symbols_;
  std::vector<Merge>& candidates = workspace.candidates_;
  candidates.clear();
  for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
    candidates.push_back(merge_of(symbols[i], symbols[i + 1]));
  }
  while (!candidates.empty()) {
    const auto best = std::min_element(candidates.begin(), candidates.end(),
                                       [](const Merge& a, const Merge& b) { return a.rank < b.rank; });
    if (best->rank == kNoRank) return;
    const auto i = static_cast<std::size_t>(best - candidates.begin());
    symbols[i] = best->id;
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    candidates.erase(best);
    if (i > 0) candidates[i - 1] = merge_of(symbols[i - 1], symbols[i]);
    if (i < candidates.size()) candidates[i] = merge_of(symbols[i], symbols[i + 1]);
  }
}

// The same with a linked list of symbols and a heap of (rank, position), in O(n log n). A heap entry
// counts only while the pair at its position still has its rank.
void Bpe::merge_long(Workspace& workspace) const {
  constexpr std::uint32_t kEnd = std::numeric_limits<std::uint32_t>::max();
  std::vector<TokenId>& symbols = workspace.symbols_;
  std::vector<Workspace::Node>& nodes = workspace.nodes_;
  std::vector<std::uint64_t>& heap = workspace.heap_;
  require(symbols.size() < kEnd, where_, ": a piece of ", symbols.size(), " symbols is too long");

  nodes.clear();
  for (std::uint32_t i = 0; i < symbols.size(); ++i) {
    nodes.push_back({symbols[i], i == 0 ? kEnd : i - 1, i + 1 == symbols.size() ? kEnd : i + 1, false});
  }
  const auto key_of = [](std::uint32_t rank, std::uint32_t position) {
    return (std::uint64_t{rank} << 32) | position;
  };
  heap.clear();
  for (std::uint32_t i = 0; i + 1 < nodes.size(); ++i) {
    const Merge merge = merge_of(nodes[i].id, nodes[i + 1].id);
    if (merge.rank != kNoRank) heap.push_back(key_of(merge.rank, i));
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  const auto push = [&](std::uint32_t left, std::uint32_t right) {
    const Merge merge = merge_of(nodes[left].id, nodes[right].id);
    if (merge.rank == kNoRank) return;
    heap.push_back(key_of(merge.rank, left));
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const std::uint64_t key = heap.back();
    heap.pop_back();
    const auto position = static_cast<std::uint32_t>(key);
    Workspace::Node& node = nodes[position];
    if (node.gone || node.next == kEnd) continue;
    Workspace::Node& right = nodes[node.next];
    const Merge merge = merge_of(node.id, right.id);
    if (merge.rank != key >> 32) continue;
    node.id = merge.id;
    right.gone = true;
    node.next = right.next;
    if (node.next != kEnd) {
      nodes[node.next].previous = position;
      push(position, node.next);
    }
    if (node.previous != kEnd) push(node.previous, position);
  }

  symbols.clear();
  for (std::uint32_t i = 0; i != kEnd; i = nodes[i].next) symbols.push_back(nodes[i].id);
}

}  // namespace krait::tokenizer
