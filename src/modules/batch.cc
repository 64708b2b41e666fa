#include "krait/modules/batch.h"

#include <numeric>

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
  if (rows_.size() > 1) cu_seqlens_ = Tensor::from(offsets_);
  const Tensor positions = Tensor::empty({tokens_}, DType::i64);
  auto* position = positions.data<std::int64_t>();
  for (std::size_t i = 0; i < rows_.size(); ++i)
    for (std::int64_t t = offsets_[i]; t < offsets_[i + 1]; ++t)
      position[t] = pool_->position(rows_[i]) + t - offsets_[i];
  indices_ = pool_->memory().to_device(Tensor::from(rows_));
  positions_ = positions;
  memory_ = pool_->memory();
}

Batch Batch::of_rows(const Memory& memory, std::int64_t rows, std::int64_t length, const Tensor& seq_idx,
                     std::shared_ptr<StatePool> pool) {
  require(rows >= 1 && length >= 1, "a batch of ", rows, " rows of ", length,
          " tokens, expected at least 1 of 1");
  Batch batch;
  batch.training_ = true;
  batch.pool_ = std::move(pool);
  batch.tokens_ = rows * length;
  batch.rows_.resize(static_cast<std::size_t>(rows));
  std::iota(batch.rows_.begin(), batch.rows_.end(), 0);
  for (std::int64_t i = 0; i <= rows; ++i) batch.offsets_.push_back(i * length);
  const Tensor positions = Tensor::zeros({batch.tokens_}, DType::i64);
  if (seq_idx) {
    require(seq_idx.shape() == Dims{rows, length}, "seq_idx has shape ", seq_idx.shape(), ", expected ",
            Dims{rows, length});
    require(seq_idx.dtype() == DType::i32 || seq_idx.dtype() == DType::i64, "seq_idx has dtype ",
            seq_idx.dtype(), ", expected i32 or i64");
    batch.seq_idx_ = seq_idx;
  }
  const Tensor ids = seq_idx ? seq_idx.to(DType::i64).contiguous() : Tensor();
  auto* position = positions.data<std::int64_t>();
  for (std::int64_t row = 0; row < rows; ++row) {
    std::int64_t last = -1;  // document of the token before; -1: none, or padding
    for (std::int64_t t = row * length; t < (row + 1) * length; ++t) {
      const std::int64_t id = ids ? ids.data<std::int64_t>()[t] : 0;
      if (id >= 0) {
        if (id != last) batch.pieces_.push_back({t, t});
        position[t] = t - batch.pieces_.back().begin;
        batch.pieces_.back().end = t + 1;
      }
      last = id;
    }
  }
  batch.positions_ = positions;
  batch.memory_ = memory;
  return batch;
}

const Tensor& Batch::positions() const {
  positions_ = memory_.to_device(positions_);
  return positions_;
}

Batch Batch::of_steps(std::shared_ptr<StatePool> pool, const Tensor& rows) {
  Batch batch;
  batch.pool_ = std::move(pool);
  batch.tokens_ = rows.size(0);
  batch.rows_.assign(static_cast<std::size_t>(batch.tokens_), -1);
  batch.indices_ = rows;
  return batch;
}

Tensor Batch::fold(const Tensor& t) const {
  if (!training_) return t.unsqueeze(0);
  Dims shape = t.shape();
  Dims strides = t.strides();
  shape[0] = size();
  shape.insert(1, tokens_ / size());
  strides.insert(0, t.stride(0) * (tokens_ / size()));
  return t.as_strided(shape, strides, 0);
}

bool Batch::consecutive() const {
  for (std::size_t i = 1; i < rows_.size(); ++i)
    if (rows_[i] != rows_[i - 1] + 1) return false;
  return true;
}

Tensor Batch::gather(Context& ctx, const Tensor& pooled) const {
  if (!has_states()) return {};
  Dims shape = pooled.shape();
  shape[0] = size();
  if (consecutive()) {
    const Tensor view = pooled.slice(0, rows_.front(), rows_.back() + 1);
    if (pooled.dtype() == DType::f32) return view;
    Tensor widened = ctx.empty(shape);
    ctx.copy(view, widened);
    return widened;
  }
  Tensor values = ctx.empty(shape);
  for (std::int64_t i = 0; i < size(); ++i) ctx.copy(pooled.select(0, row(i)), values.select(0, i));
  return values;
}

void Batch::scatter(Context& ctx, const Tensor& values, const Tensor& pooled) const {
  if (!has_states()) return;
  if (consecutive()) {
    if (pooled.dtype() != DType::f32)  // else gather gave a view
      ctx.copy(values, pooled.slice(0, rows_.front(), rows_.back() + 1));
    return;
  }
  for (std::int64_t i = 0; i < size(); ++i) ctx.copy(values.select(0, i), pooled.select(0, row(i)));
}

void Batch::advance() const {
  if (!has_states()) return;
  for (std::int64_t i = 0; i < size(); ++i)
    pool_->set_position(row(i), pool_->position(row(i)) + end(i) - begin(i));
}

}  // namespace krait
