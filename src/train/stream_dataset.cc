#include "train/stream_dataset.h"

#include <algorithm>

#include "krait/core/error.h"
#include "train/fixed_batches.h"
#include "train/permutation.h"

namespace krait::dataset {
namespace {

std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

class StreamDataset : public Dataset {
 public:
  StreamDataset(TokenStream stream, const DatasetOptions& options, const std::string& name);

  [[nodiscard]] std::int64_t seq_len() const override { return options_.seq_len; }
  [[nodiscard]] std::int64_t batch_size() const override { return options_.batch_size; }
  [[nodiscard]] std::int64_t tokens() const override { return stream_.size(); }
  [[nodiscard]] std::int64_t batches_per_epoch() const override {
    return divided_up(sequences_, batch_size());
  }
  void fill(std::int64_t micro_batch_index, TrainingBatch& batch) const override;
  [[nodiscard]] bool restarts(std::int64_t micro_batch_index, std::int64_t row) const override;

 private:
  // Where the sequence of a row begins; at or behind the last token where the row is empty.
  [[nodiscard]] std::int64_t begin_of(std::int64_t micro_batch_index, std::int64_t row) const;
  [[nodiscard]] std::int64_t offset(std::int64_t epoch) const;
  [[nodiscard]] bool has_seq_idx() const { return options_.document_boundaries && stream_.documents() > 1; }
  void fill_row(std::int64_t begin, std::span<std::int64_t> inputs, std::span<std::int64_t> targets,
                std::span<std::int32_t> seq_idx) const;

  TokenStream stream_;
  DatasetOptions options_;
  std::int64_t sequences_ = 0;  // of an epoch
  std::int64_t offsets_ = 1;    // places where the first of them may begin
};

StreamDataset::StreamDataset(TokenStream stream, const DatasetOptions& options, const std::string& name)
    : stream_(std::move(stream)), options_(options) {
  const std::int64_t length = options_.seq_len;
  const std::int64_t predictions = stream_.size() - 1;
  if (!options_.shuffle) {
    require(predictions >= 1, name, ": has ", stream_.size(), " tokens, expected at least 2");
    sequences_ = divided_up(predictions, length);
    return;
  }
  // With carry each row has as many sequences as the others.
  const std::int64_t rows = options_.carry ? options_.batch_size : 1;
  // Enough is left over for the first sequence to begin at every place of a sequence's length at least,
  // unless that would leave none.
  const std::int64_t roomy = (predictions - (length - 1)) / (rows * length) * rows;
  sequences_ = roomy > 0 ? roomy : predictions / (rows * length) * rows;
  require(sequences_ > 0, name, ": has ", stream_.size(), " tokens, expected at least ", rows * length + 1,
          rows == 1 ? concat(": one sequence of ", length, " and a target")
                    : concat(": one sequence of ", length, " for each of ", rows, " rows, and a target"));
  offsets_ = predictions - sequences_ * length + 1;
}

std::int64_t StreamDataset::offset(std::int64_t epoch) const {
  return random_offset(offsets_, options_.seed, static_cast<std::uint64_t>(epoch));
}

std::int64_t StreamDataset::begin_of(std::int64_t micro_batch_index, std::int64_t row) const {
  const std::int64_t length = seq_len();
  if (options_.carry || !options_.shuffle) {
    const std::int64_t batches = batches_per_epoch();
    const std::int64_t epoch = micro_batch_index / batches;
    const std::int64_t step = micro_batch_index % batches;
    const std::int64_t sequence = options_.carry ? row * batches + step : step * batch_size() + row;
    return offset(epoch) + sequence * length;
  }
  const std::int64_t draw = micro_batch_index * batch_size() + row;
  const std::int64_t epoch = draw / sequences_;
  const Permutation order(sequences_, options_.seed, static_cast<std::uint64_t>(epoch));
  return offset(epoch) + order(draw % sequences_) * length;
}

bool StreamDataset::restarts(std::int64_t micro_batch_index, std::int64_t row) const {
  if (!options_.carry || micro_batch_index % batches_per_epoch() == 0) return true;
  const std::int64_t begin = begin_of(micro_batch_index, row);
  if (begin >= stream_.size()) return true;
  return options_.document_boundaries && stream_.next_document_end(begin - 1) == begin;
}

void StreamDataset::fill(std::int64_t micro_batch_index, TrainingBatch& batch) const {
  const Dims shape{batch_size(), seq_len()};
  reshape(batch.inputs, shape, DType::i64);
  reshape(batch.targets, shape, DType::i64);
  if (has_seq_idx())
    reshape(batch.seq_idx, shape, DType::i32);
  else
    batch.seq_idx = {};
  for (std::int64_t row = 0; row < batch_size(); ++row)
    fill_row(begin_of(micro_batch_index, row), batch.inputs.select(0, row).span<std::int64_t>(),
             batch.targets.select(0, row).span<std::int64_t>(),
             has_seq_idx() ? batch.seq_idx.select(0, row).span<std::int32_t>() : std::span<std::int32_t>());
}

void StreamDataset::fill_row(std::int64_t begin, std::span<std::int64_t> inputs,
                             std::span<std::int64_t> targets, std::span<std::int32_t> seq_idx) const {
  // The last token of all has no target, and behind it there is none.
  const std::int64_t count = std::clamp<std::int64_t>(stream_.size() - begin, 0, seq_len());
  const std::int64_t with_target = std::clamp<std::int64_t>(stream_.size() - 1 - begin, 0, seq_len());
  stream_.read(begin, inputs.first(static_cast<std::size_t>(count)));
  stream_.read(begin + 1, targets.first(static_cast<std::size_t>(with_target)));
  std::fill(inputs.begin() + count, inputs.end(), 0);
  std::fill(targets.begin() + with_target, targets.end(), TrainingBatch::kNoLoss);
  if (seq_idx.empty()) return;
  // Documents that end at begin + 1 up to begin + with_target: their last token is an input, and what follows
  // it belongs to the next document.
  std::int32_t document = 0;
  std::int64_t filled = 0;
  while (filled < with_target) {
    const std::int64_t end = stream_.next_document_end(begin + filled) - begin;
    if (end > with_target) break;
    targets[static_cast<std::size_t>(end - 1)] = TrainingBatch::kNoLoss;
    std::fill(seq_idx.begin() + filled, seq_idx.begin() + end, document++);
    filled = end;
  }
  std::fill(seq_idx.begin() + filled, seq_idx.end(), document);
}

}  // namespace

std::unique_ptr<Dataset> stream_dataset(TokenStream stream, const DatasetOptions& options,
                                        const std::string& name) {
  return std::make_unique<StreamDataset>(std::move(stream), options, name);
}

}  // namespace krait::dataset
