#include "train/validation.h"

#include <algorithm>
#include <numbers>
#include <string_view>
#include <utility>

#include "krait/core/error.h"
#include "krait/eval/score.h"
#include "krait/train/dataset.h"
#include "tokenizer/text_files.h"
#include "train/fixed_batches.h"

namespace krait {

ValidationSet::ValidationSet(Context& ctx, const std::vector<std::string>& paths, const Tokenizer* tokenizer,
                             std::int64_t seq_len, std::int64_t vocab_size) {
  for (const std::string& path : paths) {
    const std::filesystem::path file(path);
    if (file.extension() != ".npy" && file.extension() != ".bin") {
      if (tokenizer == nullptr)
        fail(ErrorKind::not_found, path, ": is a text, and the model has no tokenizer to encode it with");
      add_text(path, *tokenizer, seq_len);
    } else {
      add_ids(ctx, path, seq_len, vocab_size);
    }
  }
}

void ValidationSet::add_text(const std::string& path, const Tokenizer& tokenizer, std::int64_t seq_len) {
  tokenizer::TextFiles file({path}, tokenizer::TextFiles::Cut::never);
  const auto end = tokenizer::TextFiles::is_jsonl(path) ? end_of_text(tokenizer) : std::nullopt;
  std::vector<std::int64_t> ids;
  while (const auto range = file.next()) {
    file.for_each_text(*range, [&](std::string_view text, bool) {
      const std::vector<std::int64_t> more = tokenizer.encode(text);
      ids.insert(ids.end(), more.begin(), more.end());
      if (end) ids.push_back(*end);
      text_bytes_ += static_cast<std::int64_t>(text.size());
    });
  }
  const auto tokens = static_cast<std::int64_t>(ids.size());
  require(tokens >= seq_len, path, ": has ", tokens, " tokens, expected at least seq_len = ", seq_len);
  const std::int64_t count = tokens / seq_len;
  ids.resize(static_cast<std::size_t>(count * seq_len));
  blocks_.push_back(Tensor::from(ids, {count, seq_len}));
  text_tokens_ += tokens;
}

void ValidationSet::add_ids(Context& ctx, const std::string& path, std::int64_t seq_len,
                            std::int64_t vocab_size) {
  all_text_ = false;
  const bool fixed = dataset::holds_fixed_batches(path);
  const auto data = Dataset::open(ctx, {path}, nullptr,
                                  {.seq_len = fixed ? 0 : seq_len,
                                   .batch_size = fixed ? 0 : 1,
                                   .vocab_size = vocab_size,
                                   .document_boundaries = false,
                                   .shuffle = false});
  require(fixed || data->tokens() >= seq_len, path, ": has ", data->tokens(),
          " tokens, expected at least seq_len = ", seq_len);
  // Rows of fixed batches have their last target behind their inputs; blocks of a stream have none.
  const std::int64_t rows = data->batch_size();
  const std::int64_t inputs = data->seq_len();
  const std::int64_t batches = fixed ? data->batches_per_epoch() : data->tokens() / seq_len;
  Tensor ids = Tensor::empty({batches * rows, inputs + (fixed ? 1 : 0)}, DType::i64);
  TrainingBatch batch;
  for (std::int64_t i = 0; i < batches; ++i) {
    data->fill(i, batch);
    const Tensor to = ids.slice(0, i * rows, (i + 1) * rows);
    to.slice(1, 0, inputs).copy_from(batch.inputs);
    if (fixed) to.slice(1, inputs, inputs + 1).copy_from(batch.targets.slice(1, inputs - 1, inputs));
  }
  blocks_.push_back(std::move(ids));
}

ValidationSet::Result ValidationSet::evaluate(Context& ctx, const LanguageModel& model) const {
  double sum = 0.0;
  std::int64_t predictions = 0;
  for (const Tensor& blocks : blocks_) {
    const Score score = score_ids(ctx, model, blocks);
    sum += score.loss * static_cast<double>(score.tokens);
    predictions += score.tokens;
  }
  Result result{.loss = sum / static_cast<double>(predictions)};
  if (all_text_)
    result.bits_per_byte = result.loss / std::numbers::ln2 * static_cast<double>(text_tokens_) /
                           static_cast<double>(text_bytes_);
  return result;
}

}  // namespace krait
