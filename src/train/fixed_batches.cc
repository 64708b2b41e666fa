#include "train/fixed_batches.h"

#include <algorithm>

#include "krait/core/error.h"
#include "krait/io/npy.h"

namespace krait::dataset {
namespace {

class FixedBatches : public Dataset {
 public:
  FixedBatches(Tensor ids) : ids_(std::move(ids)) {}

  [[nodiscard]] std::int64_t seq_len() const override { return ids_.size(2) - 1; }
  [[nodiscard]] std::int64_t batch_size() const override { return ids_.size(1); }
  [[nodiscard]] std::int64_t tokens() const override { return ids_.numel(); }
  [[nodiscard]] std::int64_t batches_per_epoch() const override { return ids_.size(0); }

  void fill(std::int64_t micro_batch_index, TrainingBatch& batch) const override {
    const Tensor rows = ids_.select(0, micro_batch_index % ids_.size(0));
    reshape(batch.inputs, {batch_size(), seq_len()}, DType::i64);
    reshape(batch.targets, {batch_size(), seq_len()}, DType::i64);
    batch.inputs.copy_from(rows.slice(1, 0, seq_len()));
    batch.targets.copy_from(rows.slice(1, 1, seq_len() + 1));
    batch.seq_idx = {};
  }
  [[nodiscard]] bool restarts(std::int64_t, std::int64_t) const override { return true; }

 private:
  Tensor ids_;  // (steps, B, L + 1) i64
};

}  // namespace

bool holds_fixed_batches(const std::filesystem::path& path) {
  return path.extension() == ".npy" && io::read_npy(path).ndim() == 3;
}

void reshape(Tensor& tensor, const Dims& shape, DType dtype) {
  if (!tensor || tensor.dtype() != dtype || tensor.shape() != shape || !tensor.is_contiguous())
    tensor = Tensor::empty(shape, dtype);
}

std::unique_ptr<Dataset> fixed_batches(const Tensor& ids, const std::string& name,
                                       const DatasetOptions& options) {
  const Dims& shape = ids.shape();
  require(shape[0] > 0 && shape[1] > 0 && shape[2] > 1, name, ": array has shape ", shape,
          ", expected (steps, batch, length + 1) with a token and its target at least");
  require(options.batch_size == 0 || options.batch_size == shape[1], name, ": array has shape ", shape,
          ", expected ", options.batch_size, " rows in each batch: the batch size that was asked for");
  require(options.seq_len == 0 || options.seq_len == shape[2] - 1, name, ": array has shape ", shape,
          ", expected rows of ", options.seq_len + 1,
          ": the sequence length that was asked for and a target");
  const Tensor wide = ids.to(DType::i64).contiguous();
  const auto values = wide.span<std::int64_t>();
  const auto bad = std::find_if(values.begin(), values.end(),
                                [&](std::int64_t id) { return id < 0 || id >= options.vocab_size; });
  require(bad == values.end(), name, ": has the token id ", bad == values.end() ? 0 : *bad,
          ", expected ids from 0 to ", options.vocab_size - 1, " (the vocabulary has ", options.vocab_size,
          " tokens)");
  return std::make_unique<FixedBatches>(wide);
}

}  // namespace krait::dataset
