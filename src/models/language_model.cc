#include "krait/models/language_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "krait/core/error.h"
#include "krait/ops/embedding.h"
#include "krait/ops/linear.h"
#include "models/backbones.h"

namespace krait {
namespace {

// Tokens that run through the layers at a time: enough for products to be large, few enough for
// activations to stay small beside the weights.
constexpr std::int64_t kPassTokens = 512;
constexpr std::int64_t kPassTokensOfGpu = 16384;

bool bidirectional(const ModelConfig& c) { return !c.attn_layer_idx.empty() && !c.attn.causal; }

std::uint64_t fingerprint_of(const std::vector<LayerStateShape>& shapes) {
  std::uint64_t hash = 0xcbf29ce484222325U;  // FNV-1a
  const auto mix = [&](std::uint64_t value) { hash = (hash ^ value) * 0x100000001b3U; };
  for (const auto& shape : shapes)
    for (const Dims* dims : {&shape.conv, &shape.ssm, &shape.kv}) {
      mix(static_cast<std::uint64_t>(dims->size()));
      for (const std::int64_t size : *dims) mix(static_cast<std::uint64_t>(size));
    }
  return hash;
}

}  // namespace

void Backbone::step(Context& ctx, const Tensor& hidden, const Batch& batch, const Tensor& head_weight,
                    const Tensor& logits) const {
  linear(ctx, {.x = forward(ctx, hidden, batch), .weight = head_weight, .out = logits});
}

LanguageModel::LanguageModel(const ModelConfig& config)
    : config_(config),
      backbone_(config.format == Format::gpt_neox ? make_gpt_neox(config) : make_mixer_model(config)) {}

void LanguageModel::initialize(std::uint64_t seed, DType dtype) {
  Rng rng(seed);
  const auto convert = [&] {
    visit([&](const Parameter& p) {
      if (p.kind == ParameterKind::matrix && p.tensor) p.tensor = p.tensor.to(dtype);
    });
  };
  constexpr float kEmbeddingDeviation = 0.02F;
  embedding_ = Tensor::empty({config_.padded_vocab_size(), config_.d_model});
  for (float& value : embedding_.span<float>()) value = kEmbeddingDeviation * rng.normal();
  convert();
  backbone_->initialize(rng, convert);
  if (!config_.tie_embeddings) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(config_.d_model));
    lm_head_ = Tensor::empty(embedding_.shape());
    for (float& value : lm_head_.span<float>())
      value = static_cast<float>(bound * (2.0 * rng.uniform() - 1.0));
  }
  convert();
  memory_ = {};
  Context host(ContextOptions{.threads = 1});
  prepare(host);
}

void LanguageModel::visit(const ParameterVisitor& visitor) {
  const bool neox = config_.format == Format::gpt_neox;
  const Dims shape{config_.padded_vocab_size(), config_.d_model};
  visitor({.name = neox ? "gpt_neox.embed_in.weight" : "backbone.embedding.weight",
           .shape = shape,
           .tensor = embedding_,
           .gradient = dembedding_,
           .kind = ParameterKind::matrix});
  backbone_->visit(visitor);
  if (!config_.tie_embeddings)
    visitor({.name = neox ? "embed_out.weight" : "lm_head.weight",
             .shape = shape,
             .tensor = lm_head_,
             .gradient = dlm_head_,
             .kind = ParameterKind::matrix});
}

void LanguageModel::prepare(Context& ctx) { backbone_->prepare(ctx); }

void LanguageModel::to_device(Context& ctx) {
  drop_gradients();
  visit([&](const Parameter& p) { p.tensor = ctx.to_device(p.tensor); });
  memory_ = ctx.on_gpu() ? ctx.memory() : Memory();
  prepare(ctx);
}

// The CPU computes in f32 whatever it reads; a GPU multiplies 16-bit matrices with activations of their
// dtype. GPT-NeoX has no residual beside its hidden states, which therefore stay f32.
DType LanguageModel::activation_dtype(const Context& ctx) const {
  return ctx.on_gpu() && config_.format != Format::gpt_neox ? embedding_.dtype() : DType::f32;
}

std::shared_ptr<StatePool> LanguageModel::make_pool(std::int64_t capacity, DType state_dtype) const {
  auto shapes = backbone_->state_shapes();
  const std::uint64_t fingerprint = fingerprint_of(shapes);
  return StatePool::create(std::move(shapes), fingerprint, capacity, memory_, state_dtype);
}

const Tensor& LanguageModel::head_weight() const { return config_.tie_embeddings ? embedding_ : lm_head_; }

Tensor LanguageModel::head(Context& ctx, const Tensor& hidden) const {
  return linear(ctx, {.x = hidden,
                      .weight = head_weight(),
                      .out = ctx.empty({hidden.size(0), config_.padded_vocab_size()})});
}

void LanguageModel::check(std::span<const Sequence> sequences) const {
  const std::uint64_t fingerprint = fingerprint_of(backbone_->state_shapes());
  std::set<std::int64_t> rows;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    require(!s.ids.empty(), "sequence ", i, " has no tokens, expected at least 1");
    for (std::size_t t = 0; t < s.ids.size(); ++t)
      require(s.ids[t] >= 0 && s.ids[t] < config_.vocab_size, "id ", s.ids[t], " at position ", t,
              " of sequence ", i, ", expected 0 to vocab_size - 1 = ", config_.vocab_size - 1);
    require((s.state == nullptr) == (sequences[0].state == nullptr),
            "some sequences of a batch have a state and others have none, expected all or none");
    if (s.state == nullptr) continue;
    require(s.state->pool() == sequences[0].state->pool(),
            "the states of a batch belong to different pools, expected one make_pool()");
    require(rows.insert(s.state->row()).second,
            "two sequences of a batch share one state, expected one each (fork it)");
    require(s.state->pool()->fingerprint() == fingerprint,
            "a state belongs to another model than it runs on");
  }
}

void LanguageModel::for_each_pass(Context& ctx, std::span<const Sequence> sequences,
                                  const std::function<void(const Pass&)>& visit) const {
  // Everything is checked before any state changes.
  check(sequences);
  if (sequences.empty()) return;
  if (sequences[0].state != nullptr) {
    run_passes(ctx, sequences, 0, visit);
    return;
  }
  // States of their own for a few sequences at a time: there may be many sequences, and states are large.
  constexpr std::size_t kGroup = 16;
  const auto pool = make_pool(static_cast<std::int64_t>(std::min(kGroup, sequences.size())));
  for (std::size_t begin = 0; begin < sequences.size(); begin += kGroup) {
    const auto part = sequences.subspan(begin, std::min(kGroup, sequences.size() - begin));
    std::vector<State> states;
    std::vector<Sequence> group;
    states.reserve(part.size());
    for (const Sequence& s : part) group.push_back({.ids = s.ids, .state = &states.emplace_back(pool)});
    run_passes(ctx, group, begin, visit);
  }
}

void LanguageModel::run_passes(Context& ctx, std::span<const Sequence> sequences, std::size_t offset,
                               const std::function<void(const Pass&)>& visit) const {
  const auto left_of = [&](std::size_t i, std::int64_t done) {
    return static_cast<std::int64_t>(sequences[i].ids.size()) - done;
  };
  // Attention that looks ahead needs the whole sequence at once.
  const std::int64_t pass_tokens = bidirectional(config_) ? std::numeric_limits<std::int64_t>::max()
                                   : ctx.on_gpu()         ? kPassTokensOfGpu
                                                          : kPassTokens;
  std::size_t first = 0;  // the first sequence that has not ended
  std::int64_t done = 0;  // tokens of it that earlier passes took
  while (first < sequences.size()) {
    ctx.check_cancelled();
    // The next pass: what is left of the sequences in their order, until it is full.
    std::vector<std::int64_t> which;
    std::vector<std::int64_t> begins;
    std::vector<std::int64_t> lengths;
    std::vector<std::int64_t> rows;
    std::vector<std::int64_t> ids;
    while (first < sequences.size() && static_cast<std::int64_t>(ids.size()) < pass_tokens) {
      const std::int64_t take =
          std::min(left_of(first, done), pass_tokens - static_cast<std::int64_t>(ids.size()));
      const auto part =
          sequences[first].ids.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(take));
      ids.insert(ids.end(), part.begin(), part.end());
      which.push_back(static_cast<std::int64_t>(first + offset));
      begins.push_back(done);
      lengths.push_back(take);
      rows.push_back(sequences[first].state->row());
      done += take;
      if (left_of(first, done) > 0) break;
      ++first;
      done = 0;
    }
    const Batch batch(sequences[0].state->pool(), std::move(rows), lengths);
    const Tensor embedded = embedding(
        ctx,
        {.ids = ctx.to_device(Tensor::from(ids)), .weight = embedding_, .out_dtype = activation_dtype(ctx)});
    const Tensor hidden = backbone_->forward(ctx, embedded, batch);
    batch.advance();
    visit({.hidden = hidden, .batch = batch, .sequence = which, .begins = begins});
  }
}

Tensor LanguageModel::logits(Context& ctx, std::span<const Sequence> sequences, LogitRows rows) const {
  std::vector<std::int64_t> offsets{0};
  for (const Sequence& s : sequences)
    offsets.push_back(offsets.back() +
                      (rows == LogitRows::all ? static_cast<std::int64_t>(s.ids.size()) : 1));
  Tensor out = ctx.empty({offsets.back(), config_.padded_vocab_size()});
  for_each_pass(ctx, sequences, [&](const Pass& pass) {
    if (rows == LogitRows::all) {
      for (std::int64_t i = 0; i < pass.batch.size(); ++i) {
        const std::int64_t begin = offsets[static_cast<std::size_t>(pass.sequence[i])] + pass.begins[i];
        const std::int64_t length = pass.batch.end(i) - pass.batch.begin(i);
        linear(ctx, {.x = pass.hidden.slice(0, pass.batch.begin(i), pass.batch.end(i)),
                     .weight = head_weight(),
                     .out = out.slice(0, begin, begin + length)});
      }
      return;
    }
    // Sequences that end in this pass come before the one that does not.
    std::int64_t ended = 0;
    for (std::int64_t i = 0; i < pass.batch.size(); ++i) {
      const auto length =
          static_cast<std::int64_t>(sequences[static_cast<std::size_t>(pass.sequence[i])].ids.size());
      if (pass.begins[i] + pass.batch.end(i) - pass.batch.begin(i) == length) ++ended;
    }
    if (ended == 0) return;
    Tensor last = pass.hidden;
    if (!pass.batch.is_step() || ended != pass.batch.size()) {
      std::vector<std::int64_t> rows_of_last;
      for (std::int64_t i = 0; i < ended; ++i) rows_of_last.push_back(pass.batch.end(i) - 1);
      last = embedding(ctx, {.ids = ctx.to_device(Tensor::from(rows_of_last)),
                             .weight = pass.hidden,
                             .out_dtype = pass.hidden.dtype()});
    }
    linear(ctx, {.x = last,
                 .weight = head_weight(),
                 .out = out.slice(0, pass.sequence[0], pass.sequence[0] + ended)});
  });
  return out;
}

void LanguageModel::step(Context& ctx, const Tensor& ids, const Batch& batch, const Tensor& logits) const {
  if (batch.size() == 1 && backbone_->step_at_once(ctx, ids, embedding_, batch, head_weight(), logits))
    return;
  const OverlappingKernels overlap(ctx);
  const Tensor embedded =
      embedding(ctx, {.ids = ids, .weight = embedding_, .out_dtype = activation_dtype(ctx)});
  backbone_->step(ctx, embedded, batch, head_weight(), logits);
}

bool LanguageModel::steps_can_be_recorded() const {
  return config_.format != Format::gpt_neox && config_.attn_layer_idx.empty();
}

Tensor LanguageModel::logits(Context& ctx, std::span<const std::int64_t> ids, State& state,
                             LogitRows rows) const {
  const Sequence sequence{.ids = ids, .state = &state};
  return logits(ctx, std::span(&sequence, 1), rows);
}

}  // namespace krait
