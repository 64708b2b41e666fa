#include "krait/eval/score.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>
#include <vector>

#include "krait/core/error.h"
#include "krait/ops/cross_entropy.h"

namespace krait {
namespace {

Score score_sequences(Context& ctx, const LanguageModel& model, std::span<const Sequence> sequences) {
  double sum = 0.0;
  Score score;
  constexpr std::int64_t kIgnore = -100;
  model.for_each_pass(ctx, sequences, [&](const LanguageModel::Pass& pass) {
    // A token's target is the one after it; the last of a sequence has none.
    std::vector<std::int64_t> targets;
    for (std::int64_t i = 0; i < pass.batch.size(); ++i) {
      const auto at = static_cast<std::size_t>(i);
      const auto ids = sequences[static_cast<std::size_t>(pass.sequence[at])].ids;
      const auto begin = static_cast<std::size_t>(pass.begins[at]);
      const auto length = static_cast<std::size_t>(pass.batch.end(i) - pass.batch.begin(i));
      for (std::size_t t = begin + 1; t <= begin + length; ++t)
        targets.push_back(t < ids.size() ? ids[t] : kIgnore);
    }
    const CrossEntropyResult result =
        linear_cross_entropy(ctx, {.x = pass.hidden,
                                   .weight = model.head_weight(),
                                   .targets = ctx.to_device(Tensor::from(targets)),
                                   .ignore_index = kIgnore});
    sum += result.mean * static_cast<double>(result.count);
    score.tokens += result.count;
  });
  score.loss = sum / static_cast<double>(score.tokens);
  score.perplexity = std::exp(score.loss);
  return score;
}

// (rows, length) ids as contiguous i64.
Tensor checked_ids(const Tensor& ids, std::int64_t least) {
  require(ids.ndim() == 2 && ids.size(0) >= 1 && ids.size(1) >= least, "ids have shape ", ids.shape(),
          ", expected (rows, length) with at least one row of ", least, least == 1 ? " token" : " tokens");
  require(ids.dtype() == DType::i64 || ids.dtype() == DType::i32, "ids have dtype ", ids.dtype(),
          ", expected i64 or i32");
  return ids.to(DType::i64).contiguous();
}

std::vector<Sequence> rows_of(const Tensor& ids) {
  const std::span<const std::int64_t> all = ids.span<std::int64_t>();
  const auto length = static_cast<std::size_t>(ids.size(1));
  std::vector<Sequence> rows;
  for (std::size_t at = 0; at < all.size(); at += length) rows.push_back({.ids = all.subspan(at, length)});
  return rows;
}

}  // namespace

Score score_ids(Context& ctx, const LanguageModel& model, const Tensor& ids) {
  const Tensor flat = checked_ids(ids, 2);
  return score_sequences(ctx, model, rows_of(flat));
}

Tensor logits_of_ids(Context& ctx, const LanguageModel& model, const Tensor& ids) {
  const Tensor flat = checked_ids(ids, 1);
  return ctx.to_host(model.logits(ctx, rows_of(flat), LogitRows::all)).view({ids.size(0), ids.size(1), -1});
}

Score score_text(Context& ctx, const LanguageModel& model, const Tokenizer& tokenizer, std::string_view text,
                 std::int64_t block) {
  require(block == 0 || block >= 2, "block is ", block, ", expected 0 (one stream) or at least 2 tokens");
  const std::vector<std::int64_t> ids = tokenizer.encode(text);
  const auto length = block == 0 ? ids.size() : static_cast<std::size_t>(block);
  require(ids.size() >= std::max<std::size_t>(length, 2), "the text has ", ids.size(),
          " tokens, expected at least ", std::max<std::size_t>(length, 2));
  std::vector<Sequence> sequences;
  for (std::size_t begin = 0; begin + length <= ids.size(); begin += length)
    sequences.push_back({.ids = std::span(ids).subspan(begin, length)});
  Score score = score_sequences(ctx, model, sequences);
  score.bits_per_byte =
      score.loss / std::numbers::ln2 * static_cast<double>(ids.size()) / static_cast<double>(text.size());
  return score;
}

}  // namespace krait
