// Dataset: batches of tokens to train on. docs/training-data.md describes files, order and boundaries.
//
//   auto data = Dataset::open(ctx, {"books.txt", "web.jsonl"}, &tokenizer, {.seq_len = 512, .batch_size = 8,
//                                                                            .vocab_size = 50280});
//   for (std::int64_t i = 0; i < steps; ++i) data->fill(i, batch);
//
// A batch is a pure function of the files, the options and its index: a run that goes on after a stop needs
// to know nothing but the index of its next batch.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "krait/core/context.h"
#include "krait/models/language_model.h"
#include "krait/tokenizer/tokenizer.h"

namespace krait {

struct DatasetOptions {
  std::int64_t seq_len = 0;     // L; 0 takes what a file of fixed batches has, and is an error with any other
  std::int64_t batch_size = 0;  // B, likewise
  std::uint64_t seed = 0;       // of the order
  std::int64_t vocab_size = 0;  // ids must be below it
  // States and targets do not cross from one document to the next: batches carry seq_idx (where there is
  // more than one document), and the last token of a document has no target.
  bool document_boundaries = true;
  // Sequences in a new pseudo-random order each epoch, cut at other places each epoch. Without it they come
  // as they stand, all tokens in every epoch, and the last, shorter sequence is filled up with id 0 and
  // targets kNoLoss: for validation.
  bool shuffle = true;
  // Row i of a batch goes on where row i of the batch before ended, so that states can be passed on;
  // restarts() tells where not. Rows walk side by side through equal parts of the text, in order.
  bool carry = false;
  // The token that ends a document. Absent: the tokenizer's (see end_of_text).
  std::optional<std::int64_t> end_of_text;
};

class Dataset {
 public:
  // Texts are encoded here, on all threads, and kept as 16-bit or 32-bit ids; packed files and .npy files of
  // ids need no tokenizer. Fixed batches, (steps, B, L + 1) in one .npy file, are taken in order and start
  // over at their end; only vocab_size applies to them, and seq_len and batch_size where they are not 0.
  // Throws Error, naming the file and what was expected, for files that cannot be read, are empty or
  // damaged, ids outside [0, vocab_size), and less text than one sequence (with carry: one for each row).
  static std::unique_ptr<Dataset> open(Context& ctx, const std::vector<std::filesystem::path>& paths,
                                       const Tokenizer* tokenizer, const DatasetOptions& options);
  virtual ~Dataset() = default;

  [[nodiscard]] virtual std::int64_t seq_len() const = 0;
  [[nodiscard]] virtual std::int64_t batch_size() const = 0;
  // In all files together.
  [[nodiscard]] virtual std::int64_t tokens() const = 0;
  // Batches after which every sequence has come once, rounded up. Epochs follow each other without a gap: a
  // batch may hold the last sequences of one and the first of the next (but not with carry, and without
  // shuffle the rows that are left over in the last batch have no targets).
  [[nodiscard]] virtual std::int64_t batches_per_epoch() const = 0;

  // Writes inputs and targets (B, L) i64, and seq_idx (B, L) i32: 0 for the document that a row begins in,
  // one more after each end of a document; absent where the whole text is one document and without
  // document_boundaries. Tensors of `batch` that have the right shape are written to in place, and
  // batch.states stays as it is. Throws Error(invalid_argument) where a damaged packed file has an id
  // outside of the vocabulary.
  virtual void fill(std::int64_t micro_batch_index, TrainingBatch& batch) const = 0;
  // True where the row does not go on from the batch before, so that its state must be empty: always
  // without carry; with it at the beginning of an epoch, and of a document that begins with the row.
  [[nodiscard]] virtual bool restarts(std::int64_t micro_batch_index, std::int64_t row) const = 0;
};

// The id of the special token that ends texts: by its usual names, "<|endoftext|>", "<|end_of_text|>", "</s>"
// or
// "<eos>"; else 0 where that is a special token, which is where `krait tokenizer train` puts it.
[[nodiscard]] std::optional<std::int64_t> end_of_text(const Tokenizer& tokenizer);

}  // namespace krait
