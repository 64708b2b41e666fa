// Likelihoods: how probable a model finds continuations of contexts. What benchmarks of language models are
// made of (Gao et al., "A framework for few-shot language model evaluation": lm-evaluation-harness, whose
// conventions these are).
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "krait/models/load.h"

namespace krait {

struct Continuation {
  std::vector<std::int64_t> context;       // at least one id
  std::vector<std::int64_t> continuation;  // at least one id
};

struct Likelihood {
  double log_likelihood = 0.0;  // of the continuation after the context, nats, over all rows of the head
  bool is_greedy = false;       // each token of the continuation is the most probable one
};

struct LikelihoodOptions {
  // Tokens that the model sees at a time. A longer context loses tokens from its beginning; a continuation
  // must fit. 0: any.
  std::int64_t max_length = 0;
  // Sequences whose states exist at a time; 0: chosen from the size of a state.
  std::int64_t batch_size = 0;
  // What continuations have in common at their beginning runs once, and its state is forked.
  bool share_prefixes = true;
  std::function<void(std::int64_t done, std::int64_t total)> progress;  // of the continuations
};

// One likelihood for each of `continuations`, in their order; in which batches they run is not seen in the
// numbers beyond rounding. Throws where one is empty, longer than max_length or holds an id outside of the
// vocabulary, naming it by its index.
std::vector<Likelihood> likelihoods(Context& ctx, const LanguageModel& model,
                                    std::span<const Continuation> continuations,
                                    const LikelihoodOptions& options = {});

// What `batch_size` 0 stands for, from the bytes of one sequence's state.
[[nodiscard]] std::int64_t choose_batch_size(std::size_t state_bytes);

// A text of any length as continuations that predict each of its tokens once: the first is predicted from
// `prefix`, and a model sees max_length tokens at a time, as many of them before what is predicted as fit.
std::vector<Continuation> rolling_windows(std::span<const std::int64_t> ids, std::int64_t prefix,
                                          std::int64_t max_length);

// What takes the place of an empty context: the tokenizer's token of the beginning of a text, else of its
// end, as tokenizer_config.json beside tokenizer.json names them, else as config.json does, else
// "<|endoftext|>". Throws Error(not_found) where there is none of these.
std::int64_t prefix_token_of(const ModelFiles& files, const Tokenizer& tokenizer);

// The longest input that config.json allows (n_positions, max_position_embeddings or n_ctx), else that
// tokenizer_config.json does (model_max_length), else 2,048, which the harness takes for models without a
// limit.
std::int64_t max_length_of(const ModelFiles& files);

// Texts to ids as the harness encodes them.
class PairEncoder {
 public:
  PairEncoder(const Tokenizer& tokenizer, std::int64_t prefix_token);

  // Context and continuation are encoded as one text, whose ids are cut where those of the context alone end;
  // white space at the end of the context belongs to the continuation. After an empty context, or one of
  // white space alone, the continuation follows the prefix token, unless it begins with that itself. Throws
  // where the continuation has no token.
  Continuation encode(std::string_view context, std::string_view continuation);
  // A whole text, with what the tokenizer adds to texts, unless it begins with the prefix token already.
  [[nodiscard]] std::vector<std::int64_t> encode_text(std::string_view text) const;
  [[nodiscard]] std::int64_t prefix_token() const { return prefix_token_; }

 private:
  Tokenizer tokenizer_;
  std::int64_t prefix_token_;
  std::string prefix_text_;
  std::string last_context_;  // choices share one
  std::vector<std::int64_t> last_ids_;
};

}  // namespace krait
