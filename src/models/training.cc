// The training step of a language model: forward onto a tape, head and loss together, backward.
#include <algorithm>
#include <utility>

#include "krait/core/error.h"
#include "krait/models/language_model.h"
#include "krait/ops/embedding.h"

namespace krait {
namespace {

void check_batch(const TrainingBatch& batch, const ModelConfig& config) {
  require(batch.inputs.defined() && batch.inputs.ndim() == 2 && batch.inputs.numel() > 0,
          "training inputs have shape ", batch.inputs.shape(), ", expected (B, L) with at least one token");
  require(batch.targets.shape() == batch.inputs.shape(), "training targets have shape ",
          batch.targets.shape(), ", expected ", batch.inputs.shape());
  for (const Tensor& t : {batch.inputs, batch.targets})
    require(t.dtype() == DType::i64, "training inputs or targets have dtype ", t.dtype(), ", expected i64");
  const Tensor inputs = batch.inputs.contiguous();
  const Tensor targets = batch.targets.contiguous();
  const auto* ids = inputs.data<std::int64_t>();
  const auto* expected = targets.data<std::int64_t>();
  const std::int64_t vocabulary = config.vocab_size;
  for (std::int64_t i = 0, count = inputs.numel(); i < count; ++i) {
    const std::int64_t id = ids[i];
    const std::int64_t target = expected[i];
    const bool target_fits = target == TrainingBatch::kNoLoss || (target >= 0 && target < vocabulary);
    if (id >= 0 && id < vocabulary && target_fits) [[likely]]
      continue;  // without working out what a message would say
    require(id >= 0 && id < vocabulary, "id ", id, " at position ", i % inputs.size(1), " of row ",
            i / inputs.size(1), ", expected 0 to vocab_size - 1 = ", config.vocab_size - 1);
    require(target_fits, "target ", target, " at position ", i % inputs.size(1), " of row ",
            i / inputs.size(1), ", expected 0 to vocab_size - 1 = ", config.vocab_size - 1, ", or ",
            std::int64_t{TrainingBatch::kNoLoss});
  }
  if (!batch.states) return;
  require(config.format != Format::gpt_neox && config.attn_layer_idx.empty(),
          "states cannot be carried from segment to segment through attention layers");
}

}  // namespace

void LanguageModel::zero_gradients(Context& ctx) {
  // Those that are made here lie in one block of memory, which one call sets to 0.
  constexpr std::int64_t kBoundary = 64;
  const auto room = [](const Parameter& p) {
    return (numel_of(p.shape) + kBoundary - 1) / kBoundary * kBoundary;
  };
  std::int64_t total = 0;
  visit([&](const Parameter& p) { total += p.gradient ? 0 : room(p); });
  if (total > 0) {
    const Tensor block = ctx.empty({total});
    std::int64_t at = 0;
    visit([&](const Parameter& p) {
      if (p.gradient) return;
      p.gradient = block.slice(0, at, at + numel_of(p.shape)).view(p.shape);
      at += room(p);
    });
    gradient_blocks_.push_back(block);
  }
  for (const Tensor& block : gradient_blocks_) ctx.fill(block, 0.0);
  visit([&](const Parameter& p) {
    const bool filled = std::any_of(gradient_blocks_.begin(), gradient_blocks_.end(),
                                    [&](const Tensor& b) { return b.owner() == p.gradient.owner(); });
    if (!filled) ctx.fill(p.gradient, 0.0);
  });
}

void LanguageModel::drop_gradients() {
  visit([](const Parameter& p) { p.gradient = {}; });
  gradient_blocks_.clear();
}

void LanguageModel::own_parameters(Context& ctx) {
  visit([&](const Parameter& p) { p.tensor = ctx.clone(p.tensor); });
  memory_ = ctx.on_gpu() ? ctx.memory() : Memory();
  prepare(ctx);
}

CrossEntropyResult LanguageModel::accumulate_gradients(Context& ctx, const TrainingBatch& batch, Tape& tape,
                                                       double scale) {
  check_batch(batch, config_);
  const std::int64_t T = batch.inputs.numel();
  const Batch rows =
      Batch::of_rows(ctx.memory(), batch.inputs.size(0), batch.inputs.size(1), batch.seq_idx, batch.states);
  const Tensor ids = ctx.to_device(batch.inputs.contiguous().view({T}));

  Tensor embedded = embedding(ctx, {.ids = ids, .weight = embedding_, .out_dtype = activation_dtype(ctx)});
  tape.dropout(ctx, embedded, 0);
  const Tensor hidden = backbone_->forward(ctx, std::move(embedded), rows, &tape);
  rows.advance();

  CrossEntropyResult loss = linear_cross_entropy_backward(
      ctx, {.forward = {.x = hidden,
                        .weight = head_weight(),
                        .targets = ctx.to_device(batch.targets.contiguous().view({T})),
                        .ignore_index = TrainingBatch::kNoLoss},
            .scale = scale,
            .dx = hidden,  // which is its own gradient behind this
            .dweight = config_.tie_embeddings ? dembedding_ : dlm_head_,
            .read_later = true});
  tape.measure();
  const Tensor dembedded = backbone_->backward(ctx, hidden, rows, tape);
  tape.dropout(ctx, dembedded, 0);
  if (dembedding_) embedding_backward(ctx, {.ids = ids, .dout = dembedded, .dweight = dembedding_});
  read_totals(ctx, loss, "linear_cross_entropy_backward");
  return loss;
}

}  // namespace krait
