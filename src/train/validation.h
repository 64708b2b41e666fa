// The texts or ids that a run is evaluated on, encoded once.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "krait/core/context.h"
#include "krait/models/language_model.h"
#include "krait/tokenizer/tokenizer.h"

namespace krait {

class ValidationSet {
 public:
  struct Result {
    double loss = 0.0;                    // mean nats over all predictions
    std::optional<double> bits_per_byte;  // where all files are texts
  };

  // The kinds of files of Dataset. Each is cut into blocks of seq_len tokens, as score_text (and `krait score
  // --block`) cuts a text, and what is left at the end is dropped; rows of fixed batches stay as they are.
  // Documents of a JSONL file follow each other with the tokenizer's end of text between them. Throws where
  // a file has no block.
  ValidationSet(Context& ctx, const std::vector<std::string>& paths, const Tokenizer* tokenizer,
                std::int64_t seq_len, std::int64_t vocab_size);

  [[nodiscard]] bool empty() const { return blocks_.empty(); }
  // Each block from an empty state.
  [[nodiscard]] Result evaluate(Context& ctx, const LanguageModel& model) const;

 private:
  void add_text(const std::string& path, const Tokenizer& tokenizer, std::int64_t seq_len);
  void add_ids(Context& ctx, const std::string& path, std::int64_t seq_len, std::int64_t vocab_size);

  std::vector<Tensor> blocks_;  // (n, length) i64, one for each file
  bool all_text_ = true;
  std::int64_t text_tokens_ = 0;
  std::int64_t text_bytes_ = 0;
};

}  // namespace krait
