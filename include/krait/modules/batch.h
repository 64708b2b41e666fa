// Batch: what the layers of a model see of the sequences that they work on. The tokens of all sequences
// are packed one after the other without padding, (T, ...) with T the sum of the lengths. In training the
// sequences are rows of one length, which may hold several documents each (seq_idx).
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
  // Training: B rows of L tokens. seq_idx (B, L) i32 or i64, on the host, is optional: a document starts
  // where it changes. The pool, optional, has the state of row i in its row i; without one, rows start from
  // nothing.
  static Batch of_rows(const Memory& memory, std::int64_t rows, std::int64_t length,
                       const Tensor& seq_idx = {}, std::shared_ptr<StatePool> pool = {});

  // Steps of the sequences whose rows of the pool are in `rows`, (n) i64 on the device: known there alone, so
  // that what is recorded for one set of rows runs for another. For layers without keys and values.
  static Batch of_steps(std::shared_ptr<StatePool> pool, const Tensor& rows);

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(rows_.size()); }
  [[nodiscard]] std::int64_t tokens() const { return tokens_; }
  // Every sequence has one token: layers take their step kernels.
  [[nodiscard]] bool is_step() const { return !training_ && tokens_ == size(); }
  [[nodiscard]] bool has_states() const { return pool_ != nullptr; }
  [[nodiscard]] std::int64_t begin(std::int64_t i) const { return offsets_[static_cast<std::size_t>(i)]; }
  [[nodiscard]] std::int64_t end(std::int64_t i) const { return offsets_[static_cast<std::size_t>(i) + 1]; }
  [[nodiscard]] std::int64_t row(std::int64_t i) const { return rows_[static_cast<std::size_t>(i)]; }
  [[nodiscard]] StatePool& pool() const { return *pool_; }

  // (T, ...) as the operators over time take it, with the one of cu_seqlens and seq_idx that is present:
  // (1, T, ...) of packed sequences, (B, L, ...) in training.
  [[nodiscard]] Tensor fold(const Tensor& t) const;
  // (n + 1) i64; absent in training, and for one sequence, which needs no boundaries.
  [[nodiscard]] const Tensor& cu_seqlens() const { return cu_seqlens_; }
  [[nodiscard]] const Tensor& seq_idx() const { return seq_idx_; }  // (B, L), absent where not given
  // On the device: (n) i64, rows of the pool; (T) i64, place of each token in its sequence, which is sent
  // there when it is first asked for.
  [[nodiscard]] const Tensor& state_indices() const { return indices_; }
  [[nodiscard]] const Tensor& positions() const;

  // Tokens [begin, end) that attend to one another in training: documents, none longer than its row.
  struct Piece {
    std::int64_t begin;
    std::int64_t end;
  };
  [[nodiscard]] const std::vector<Piece>& pieces() const { return pieces_; }

  // The rows of `pooled` that the batch uses, (n, ...) f32: a view where they are consecutive and f32 there,
  // else a copy, which scatter writes back, rounded to the nearest. Absent without a pool.
  [[nodiscard]] Tensor gather(Context& ctx, const Tensor& pooled) const;
  void scatter(Context& ctx, const Tensor& values, const Tensor& pooled) const;

  // After all layers ran: every sequence is longer by its tokens.
  void advance() const;

 private:
  Batch() = default;
  [[nodiscard]] bool consecutive() const;

  std::shared_ptr<StatePool> pool_;
  std::vector<std::int64_t> rows_;
  std::vector<std::int64_t> offsets_;
  std::int64_t tokens_ = 0;
  Tensor cu_seqlens_;
  Tensor indices_;
  mutable Tensor positions_;
  Memory memory_;
  Tensor seq_idx_;
  std::vector<Piece> pieces_;
  bool training_ = false;
};

}  // namespace krait
