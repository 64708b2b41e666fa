#include "krait/modules/batch.h"

#include "krait/core/error.h"

namespace krait {

Batch::Batch(std::shared_ptr<StatePool> pool, std::vector<std::int64_t> rows,
             std::span<const std::int64_t> lengths)
    : pool_(std::move(pool)), rows_(std::move(rows)), offsets_{0} {
  require(rows_.size() == lengths.size(), "a batch has ", rows_.size(), " states and ", lengths.size(),
          " sequences");
  for (const std::int64_t length : lengths) {
    require(length >= 1, "a sequence of length ", length, " in a batch, expected at least 1");
    offsets_.push_back(offsets_.back() + length);
  }
  tokens_ = offsets_.back();
  cu_seqlens_ = Tensor::from(offsets_);
  indices_ = Tensor::from(rows_);
  positions_ = Tensor::empty({tokens_}, DType::i64);
  auto* position = positions_.data<std::int64_t>();
  for (std::size_t i = 0; i < rows_.size(); ++i)
    for (std::int64_t t = offsets_[i]; t < offsets_[i + 1]; ++t)
      position[t] = pool_->position(rows_[i]) + t - offsets_[i];
}

bool Batch::consecutive() const {
  for (std::size_t i = 1; i < rows_.size(); ++i)
    if (rows_[i] != rows_[i - 1] + 1) return false;
  return true;
}

Tensor Batch::gather(Context& ctx, const Tensor& pooled) const {
  if (consecutive()) return pooled.slice(0, rows_.front(), rows_.back() + 1);
  Dims shape = pooled.shape();
  shape[0] = size();
  Tensor values = ctx.empty(shape);
  for (std::int64_t i = 0; i < size(); ++i) values.select(0, i).copy_from(pooled.select(0, row(i)));
  return values;
}

void Batch::scatter(const Tensor& values, const Tensor& pooled) const {
  if (consecutive()) return;  // gather gave a view
  for (std::int64_t i = 0; i < size(); ++i) pooled.select(0, row(i)).copy_from(values.select(0, i));
}

void Batch::advance() const {
  for (std::int64_t i = 0; i < size(); ++i)
    pool_->set_position(row(i), pool_->position(row(i)) + end(i) - begin(i));
}

}  // namespace krait
