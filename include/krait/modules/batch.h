// Batch: what the layers of a model see of the sequences that they work on. The tokens of all sequences
// are packed one after the other without padding, (T, ...) with T the sum of the lengths.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/modules/state.h"

namespace krait {

class Batch {
 public:
  // Sequence i has lengths[i] >= 1 tokens, on top of the state in rows[i] of the pool.
  Batch(std::shared_ptr<StatePool> pool, std::vector<std::int64_t> rows,
        std::span<const std::int64_t> lengths);

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(rows_.size()); }
  [[nodiscard]] std::int64_t tokens() const { return tokens_; }
  // Every sequence has one token: layers take their step kernels.
  [[nodiscard]] bool is_step() const { return tokens_ == size(); }
  [[nodiscard]] std::int64_t begin(std::int64_t i) const { return offsets_[static_cast<std::size_t>(i)]; }
  [[nodiscard]] std::int64_t end(std::int64_t i) const { return offsets_[static_cast<std::size_t>(i) + 1]; }
  [[nodiscard]] std::int64_t row(std::int64_t i) const { return rows_[static_cast<std::size_t>(i)]; }
  [[nodiscard]] StatePool& pool() const { return *pool_; }

  [[nodiscard]] const Tensor& cu_seqlens() const { return cu_seqlens_; }  // (n + 1) i64
  [[nodiscard]] const Tensor& state_indices() const { return indices_; }  // (n) i64: rows of the pool
  [[nodiscard]] const Tensor& positions() const { return positions_; }    // (T) i64: place in its sequence

  // The rows of `pooled` that the batch uses, (n, ...): a view where they are consecutive, else a copy,
  // which scatter writes back.
  [[nodiscard]] Tensor gather(Context& ctx, const Tensor& pooled) const;
  void scatter(const Tensor& values, const Tensor& pooled) const;

  // After all layers ran: every sequence is longer by its tokens.
  void advance() const;

 private:
  [[nodiscard]] bool consecutive() const;

  std::shared_ptr<StatePool> pool_;
  std::vector<std::int64_t> rows_;
  std::vector<std::int64_t> offsets_;
  std::int64_t tokens_ = 0;
  Tensor cu_seqlens_;
  Tensor indices_;
  Tensor positions_;
};

}  // namespace krait
