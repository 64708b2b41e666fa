// Sampling: from one row of logits to a token id, in this order:
//   repetition penalty over the distinct previous ids -> top_k == 1 or temperature 0: argmax -> top_k > 0:
//   keep the k best; temperature; top_p on what is left -> top_k == 0: min_p keeps tokens whose probability
//   is at least min_p times the largest; temperature; top_p.
// A logit of -infinity is a token that is never drawn. NaN and +infinity are errors, and so is a row
// without a finite logit.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/core/tensor.h"

namespace krait {

struct SamplingOptions {
  double temperature = 1.0;  // >= 0; 0 means argmax
  std::int64_t top_k = 0;    // 0: off; 1: argmax
  double top_p = 0.0;        // <= 0 or >= 1: off. The smallest set with cumulative probability >= top_p
  double min_p = 0.0;        // in [0, 1]; ignored with top_k > 0
  double repetition_penalty = 1.0;  // > 0; once for each distinct id, prompt included
};

// Throws where a value is outside its range, naming the option.
void validate(const SamplingOptions& options);

// logits (V): score < 0 ? score * penalty : score / penalty for each distinct id of `previous`. Throws for
// an id outside [0, V).
void apply_repetition_penalty(std::span<float> logits, std::span<const std::int64_t> previous,
                              double penalty);

// Filters set what they drop to -infinity. Of equal logits the smaller ids are kept first.
void filter_top_k(std::span<float> logits, std::int64_t k);  // 0: off
void filter_top_p(std::span<float> logits, double p);
void filter_min_p(std::span<float> logits, double p);

// softmax(logits), summed in f64.
std::vector<float> softmax(std::span<const float> logits);

// The distribution that `sample` draws from: probabilities (V) after penalty, filters and temperature. Ids at
// and beyond vocab_size (rows that pad the head) get 0.
std::vector<float> sampling_distribution(std::span<const float> logits, std::int64_t vocab_size,
                                         std::span<const std::int64_t> previous,
                                         const SamplingOptions& options);

struct Sample {
  std::int64_t id = 0;
  float logprob = 0.0F;  // log softmax of the raw logits over [0, vocab_size) at id
};

// Draws one uniform number u in [0, 1) from rng, unless the choice is an argmax (ties: the smallest id), and
// returns the first id whose cumulative probability, by id, exceeds u. Fast for large V: no full sort.
Sample sample(std::span<const float> logits, std::int64_t vocab_size, std::span<const std::int64_t> previous,
              const SamplingOptions& options, Rng& rng);

struct SampleRowsArgs {
  Tensor logits;  // (B, V) f32, bf16 or f16, any strides
  std::int64_t vocab_size = 0;
  SamplingOptions options;
  std::uint64_t seed = 0;
  Tensor streams;    // (B) i64 or i32, optional: row b draws from Rng(seed, streams[b]), else from stream b
  Tensor positions;  // (B) i64, where each generator stands (Rng::position), advanced by a draw; only an
                     // argmax needs none
  Tensor seen;      // (B, V) u8, optional, needed for a repetition penalty: not 0 for previous ids. The drawn
                    // id is marked in it.
  Tensor ids;       // (B) i64, destination
  Tensor logprobs;  // (B) f32, optional destination
};

// `sample` for each row of a batch, where the logits are. On a GPU nothing is read on the host, so that a
// step can be recorded with its draw: all that changes from step to step is in device memory. A row that
// `sample` would refuse (NaN, infinity, no finite logit) gets the id -1 there and draws nothing; on the CPU
// it is an error. The same seed and logits give the ids of the CPU, unless the number drawn falls within
// rounding of the border between two tokens, or a sum within rounding of top_p.
void sample_rows(Context& ctx, const SampleRowsArgs& args);

}  // namespace krait
