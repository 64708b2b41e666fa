// generate: prompts in, continuations out, one batch of sequences of any lengths, streamed as they are made.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "krait/models/language_model.h"
#include "krait/ops/sampling.h"
#include "krait/tokenizer/tokenizer.h"

namespace krait {

struct GenerateOptions {
  std::int64_t max_new_tokens = 128;
  SamplingOptions sampling{.temperature = 0.8, .top_p = 0.95};
  std::uint64_t seed = 0;         // sequence i of a batch draws from stream i of this seed
  std::vector<std::string> stop;  // texts that end a sequence; they are not part of its text
  bool ignore_eos = false;        // do not end at the model's end-of-text ids
  // What the SSM states of the sequences are kept as between steps: f32, or bf16 or f16, which halves what a
  // large batch reads and writes and rounds each state to the nearest once a token.
  DType state_dtype = DType::f32;
  // New text of a sequence, in complete characters. Never called with a text that may still turn out to be
  // the beginning of a stop text.
  std::function<void(std::int64_t sequence, std::string_view text)> on_text;
};

enum class FinishReason : std::uint8_t { length, eos, stop, interrupted };
[[nodiscard]] std::string_view name_of(FinishReason reason);

struct Generation {
  std::vector<std::int64_t> ids;  // prompt and continuation; an end-of-text id that ended it included
  std::int64_t prompt_length = 0;
  std::vector<float> logprobs;  // of each new token, under the model's own distribution
  std::string text;             // of the continuation; empty without a tokenizer
  FinishReason finish = FinishReason::length;
};

struct GenerateResult {
  std::vector<Generation> sequences;
  std::int64_t prompt_tokens = 0;
  std::int64_t new_tokens = 0;
  double prefill_seconds = 0.0;  // until the first token of each sequence was known
  double decode_seconds = 0.0;   // all tokens after it
};

// `tokenizer` may be null: then there is no text, and stop texts are refused. Where the context's caller asks
// to stop, returns what was made so far (FinishReason::interrupted).
GenerateResult generate(Context& ctx, const LanguageModel& model, const Tokenizer* tokenizer,
                        std::span<const std::vector<std::int64_t>> prompts, const GenerateOptions& options);

// Holds back the end of a text while it may be the beginning of a stop text.
class StopText {
 public:
  explicit StopText(std::vector<std::string> stops);

  // Adds `piece`; returns what is now certain to come before any stop text.
  std::string push(std::string_view piece);
  // What was held back, at the end of the text.
  std::string finish();
  [[nodiscard]] bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace krait
