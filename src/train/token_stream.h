// TokenStream: all tokens to train on as one sequence, wherever they lie: encoded texts in memory, mapped
// files. Ids are kept in 16 bits where the vocabulary allows.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

namespace krait::dataset {

using Narrow = std::uint16_t;
using Wide = std::uint32_t;

// The largest vocabulary whose ids fit 16 bits.
inline constexpr std::int64_t kNarrowVocabulary = std::int64_t{1} << 16;

// Tokens of one file.
struct StreamPart {
  std::string name;  // for messages
  std::variant<std::span<const Narrow>, std::span<const Wide>> ids;
  std::span<const std::uint64_t> document_ends;  // rising, above 0; the last is the number of tokens
  std::shared_ptr<const void> owner;

  [[nodiscard]] std::int64_t size() const;
};

class TokenStream {
 public:
  explicit TokenStream(std::int64_t vocab_size) : vocab_size_(vocab_size) {}

  void add(StreamPart part);

  [[nodiscard]] std::int64_t size() const { return size_; }
  [[nodiscard]] std::int64_t documents() const { return documents_; }
  // Writes the ids from `begin` on into `out`. Throws Error(invalid_argument) where one is outside of the
  // vocabulary.
  void read(std::int64_t begin, std::span<std::int64_t> out) const;
  // The first place above `position` where a document ends (and the next one begins), or size().
  [[nodiscard]] std::int64_t next_document_end(std::int64_t position) const;

 private:
  // The part that holds the token at `position` < size().
  [[nodiscard]] std::size_t part_at(std::int64_t position) const;

  std::int64_t vocab_size_;
  std::int64_t size_ = 0;
  std::int64_t documents_ = 0;
  std::vector<StreamPart> parts_;
  std::vector<std::int64_t> begins_;  // of the parts
};

// Collects a part in memory.
class PartBuilder {
 public:
  PartBuilder(std::string name, std::int64_t vocab_size);

  // Documents end at `document_ends`, rising places in `ids`. Throws Error(invalid_argument), naming the
  // file, where an id is outside of the vocabulary.
  void append(std::span<const std::int64_t> ids, std::span<const std::size_t> document_ends = {});
  [[nodiscard]] std::int64_t size() const;
  // Ends the last document. The builder has nothing then.
  [[nodiscard]] StreamPart take();

 private:
  void end_document_at(std::uint64_t token);

  struct Memory {
    std::variant<std::vector<Narrow>, std::vector<Wide>> ids;
    std::vector<std::uint64_t> document_ends;
  };

  std::string name_;
  std::int64_t vocab_size_;
  std::shared_ptr<Memory> memory_;
};

}  // namespace krait::dataset
