#include "generate/row_sampler.h"

#include <algorithm>

#include "krait/core/error.h"

namespace krait {

// What each generator and each set of seen ids knows moves along when rows are left out.
void RowSampler::arrange(std::int64_t width, std::span<const std::int64_t> sequences,
                         std::span<const std::span<const std::int64_t>> previous) {
  if (std::equal(sequences.begin(), sequences.end(), sequences_.begin(), sequences_.end())) return;
  const auto n = static_cast<std::int64_t>(sequences.size());
  const Tensor streams = Tensor::empty({n}, DType::i64);
  std::copy(sequences.begin(), sequences.end(), streams.data<std::int64_t>());
  const Tensor positions = Tensor::zeros({n}, DType::i64);
  const Tensor before = ctx_.to_host(positions_);
  auto at = sequences_.begin();  // both are in one order
  for (std::size_t i = 0; i < sequences.size() && !sequences_.empty(); ++i) {
    at = std::find(at, sequences_.end(), sequences[i]);
    positions.data<std::int64_t>()[i] = before.data<std::int64_t>()[at - sequences_.begin()];
  }
  if (options_.repetition_penalty != 1.0) {
    const Tensor seen = Tensor::zeros({n, width}, DType::u8);
    for (std::size_t i = 0; i < previous.size(); ++i)
      for (const std::int64_t id : previous[i])
        seen.data<std::uint8_t>()[static_cast<std::int64_t>(i) * width + id] = 1;
    seen_ = ctx_.to_device(seen);
  }
  streams_ = ctx_.to_device(streams);
  positions_ = ctx_.to_device(positions);
  ids_ = ctx_.empty({n}, DType::i64);
  logprobs_ = ctx_.empty({n});
  sequences_.assign(sequences.begin(), sequences.end());
}

void RowSampler::begin(const Tensor& logits, std::span<const std::int64_t> sequences,
                       std::span<const std::span<const std::int64_t>> previous) {
  arrange(logits.size(1), sequences, previous);
  sample_rows(ctx_, {.logits = logits,
                     .vocab_size = vocab_size_,
                     .options = options_,
                     .seed = seed_,
                     .streams = streams_,
                     .positions = positions_,
                     .seen = seen_,
                     .ids = ids_,
                     .logprobs = logprobs_});
  fetch_ids_ = ctx_.fetch(ids_);
  fetch_logprobs_ = ctx_.fetch(logprobs_);
}

std::vector<Sample> RowSampler::finish() {
  const Tensor ids = fetch_ids_();
  const Tensor logprobs = fetch_logprobs_();
  std::vector<Sample> samples;
  for (std::int64_t i = 0; i < ids.numel(); ++i) {
    const std::int64_t id = ids.data<std::int64_t>()[i];
    require(id >= 0, "the logits of sequence ", sequences_[static_cast<std::size_t>(i)],
            " have a value that is NaN or infinite, or none that is finite");
    samples.push_back({.id = id, .logprob = logprobs.data<float>()[i]});
  }
  return samples;
}

}  // namespace krait
