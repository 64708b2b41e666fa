// Scoring: how well a model predicts given tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "krait/models/language_model.h"
#include "krait/tokenizer/tokenizer.h"

namespace krait {

struct Score {
  double loss = 0.0;        // mean cross-entropy in nats over the predictions, over all rows of the head
  double perplexity = 0.0;  // exp(loss)
  std::optional<double> bits_per_byte;  // of a text: loss / ln 2 x tokens of the text / its UTF-8 bytes
  std::int64_t tokens = 0;              // predictions
};

// ids (n, L) i64 or i32, L >= 2: each row from an empty state, L - 1 predictions.
Score score_ids(Context& ctx, const LanguageModel& model, const Tensor& ids);

// The text, tokenised once as a whole, as one stream with its state carried on. block > 0: cut into blocks of
// that many tokens (at least 2), each from an empty state; a last partial block is dropped.
Score score_text(Context& ctx, const LanguageModel& model, const Tokenizer& tokenizer, std::string_view text,
                 std::int64_t block = 0);

// Logits of every token of ids (n, L), each row from an empty state: (n, L, V) f32 on the host, V =
// padded_vocab_size.
Tensor logits_of_ids(Context& ctx, const LanguageModel& model, const Tensor& ids);

}  // namespace krait
