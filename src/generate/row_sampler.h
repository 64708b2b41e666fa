// RowSampler: draws of a batch of sequences where their logits are, on a GPU: ids and log-probabilities alone
// come to the host.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "krait/core/context.h"
#include "krait/ops/sampling.h"

namespace krait {

class RowSampler {
 public:
  // Sequence i draws from stream i of `seed`; ids at and beyond `vocab_size` are not drawn.
  RowSampler(Context& ctx, const SamplingOptions& options, std::uint64_t seed, std::int64_t vocab_size)
      : ctx_(ctx), options_(options), seed_(seed), vocab_size_(vocab_size) {}

  // A draw for each of `sequences` from its row of logits (n, V); previous[i] are the ids of sequence
  // sequences[i] until now. Sequences may drop out between calls, not come in. Throws as sample() does.
  std::vector<Sample> draw(const Tensor& logits, std::span<const std::int64_t> sequences,
                           std::span<const std::span<const std::int64_t>> previous) {
    begin(logits, sequences, previous);
    return finish();
  }

  // The same in two parts: what is queued between them runs while the host waits for the draws.
  void begin(const Tensor& logits, std::span<const std::int64_t> sequences,
             std::span<const std::span<const std::int64_t>> previous);
  std::vector<Sample> finish();
  // (n) i64 on the device: what the last begin() draws.
  [[nodiscard]] const Tensor& ids() const { return ids_; }

 private:
  void arrange(std::int64_t width, std::span<const std::int64_t> sequences,
               std::span<const std::span<const std::int64_t>> previous);

  Context& ctx_;
  SamplingOptions options_;
  std::uint64_t seed_;
  std::int64_t vocab_size_;
  std::vector<std::int64_t> sequences_;  // of the rows of what follows
  Tensor streams_;
  Tensor positions_;
  Tensor seen_;
  Tensor ids_;
  Tensor logprobs_;
  std::function<Tensor()> fetch_ids_;
  std::function<Tensor()> fetch_logprobs_;
};

}  // namespace krait
