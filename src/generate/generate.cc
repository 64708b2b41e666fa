#include "krait/generate/generate.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "generate/row_sampler.h"
#include "krait/core/error.h"
#include "krait/models/stepper.h"

namespace krait {
namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// One sequence on its way.
class Decoding {
 public:
  Decoding(std::int64_t index, const std::vector<std::int64_t>& prompt, const Tokenizer* tokenizer,
           const GenerateOptions& options, std::shared_ptr<StatePool> pool)
      : state(std::move(pool)),
        index_(index),
        options_(options),
        rng_(options.seed, static_cast<std::uint64_t>(index)),
        stop_(options.stop) {
    if (tokenizer != nullptr) decoder_.emplace(*tokenizer, /*skip_special=*/true);
    result.ids = prompt;
    result.prompt_length = static_cast<std::int64_t>(prompt.size());
  }

  Sample draw(std::span<const float> logits, std::int64_t vocab_size) {
    return sample(logits, vocab_size, result.ids, options_.sampling, rng_);
  }

  // Appends the next token; afterwards done() says whether it was the last.
  void take(const Sample& next, const ModelConfig& config) {
    result.ids.push_back(next.id);
    result.logprobs.push_back(next.logprob);
    const auto& eos = config.eos_token_ids;
    if (!options_.ignore_eos && std::find(eos.begin(), eos.end(), next.id) != eos.end()) {
      end(FinishReason::eos);
      return;
    }
    if (decoder_) emit(stop_.push(decoder_->push(next.id)));
    if (stop_.stopped())
      end(FinishReason::stop);
    else if (static_cast<std::int64_t>(result.logprobs.size()) >= options_.max_new_tokens)
      end(FinishReason::length);
  }

  void end(FinishReason reason) {
    if (done_) return;
    done_ = true;
    result.finish = reason;
    if (decoder_ && !stop_.stopped()) {
      emit(stop_.push(decoder_->finish()));
      if (!stop_.stopped()) emit(stop_.finish());
    }
  }

  [[nodiscard]] bool done() const { return done_; }
  [[nodiscard]] std::int64_t index() const { return index_; }

  State state;
  Generation result;

 private:
  void emit(const std::string& text) {
    if (text.empty()) return;
    result.text += text;
    if (options_.on_text) options_.on_text(index_, text);
  }

  std::int64_t index_;
  const GenerateOptions& options_;
  Rng rng_;
  std::optional<StreamDecoder> decoder_;
  StopText stop_;
  bool done_ = false;
};

// The next token of each sequence, drawn where the logits are.
std::vector<Sample> draw_all(Context& ctx, const Tensor& logits, std::span<Decoding* const> active,
                             std::int64_t vocab_size, RowSampler& sampler) {
  std::vector<Sample> samples;
  if (ctx.on_gpu()) {
    std::vector<std::int64_t> sequences;
    std::vector<std::span<const std::int64_t>> previous;
    for (const Decoding* d : active) {
      sequences.push_back(d->index());
      previous.emplace_back(d->result.ids);
    }
    return sampler.draw(logits, sequences, previous);
  }
  for (std::size_t i = 0; i < active.size(); ++i)
    samples.push_back(
        active[i]->draw(logits.select(0, static_cast<std::int64_t>(i)).span<float>(), vocab_size));
  return samples;
}

void decode_all(Context& ctx, const LanguageModel& model, std::int64_t vocab_size,
                const GenerateOptions& options, std::span<Decoding> all, GenerateResult& result) {
  auto begin = std::chrono::steady_clock::now();
  std::vector<Decoding*> active;
  std::vector<Sequence> inputs;
  for (Decoding& d : all) {
    active.push_back(&d);
    inputs.push_back({.ids = d.result.ids, .state = &d.state});
  }
  Stepper stepper(ctx, model);
  RowSampler sampler(ctx, options.sampling, options.seed, vocab_size);
  std::vector<std::int64_t> ids;
  std::vector<State*> states;
  bool first = true;
  while (!active.empty()) {
    const Tensor logits = first ? model.logits(ctx, inputs) : stepper.step(ids, states);
    const std::vector<Sample> samples = draw_all(ctx, logits, active, vocab_size, sampler);
    for (std::size_t i = 0; i < active.size(); ++i) active[i]->take(samples[i], model.config());
    if (first) {
      result.prefill_seconds = seconds_since(begin);
      begin = std::chrono::steady_clock::now();
      first = false;
    }
    std::erase_if(active, [](const Decoding* d) { return d->done(); });
    ids.clear();
    states.clear();
    for (Decoding* d : active) {
      ids.push_back(d->result.ids.back());
      states.push_back(&d->state);
    }
  }
  result.decode_seconds = seconds_since(begin);
}

}  // namespace

std::string_view name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::length: return "length";
    case FinishReason::eos: return "eos";
    case FinishReason::stop: return "stop";
    case FinishReason::interrupted: return "interrupted";
  }
  return "unknown";
}

GenerateResult generate(Context& ctx, const LanguageModel& model, const Tokenizer* tokenizer,
                        std::span<const std::vector<std::int64_t>> prompts, const GenerateOptions& options) {
  validate(options.sampling);
  require(options.max_new_tokens >= 0, "max_new_tokens is ", options.max_new_tokens, ", expected 0 or more");
  require(tokenizer != nullptr || options.stop.empty(), "stop texts need a tokenizer");
  if (options.sampling.top_k > 0 && options.sampling.min_p > 0)
    ctx.warn("min_p is ignored where top_k is given");

  GenerateResult result;
  const auto pool = model.make_pool(static_cast<std::int64_t>(prompts.size()), options.state_dtype);
  std::vector<Decoding> all;
  all.reserve(prompts.size());
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    require(!prompts[i].empty(), "prompt ", i, " has no tokens, expected at least 1");
    result.prompt_tokens += static_cast<std::int64_t>(prompts[i].size());
    all.emplace_back(static_cast<std::int64_t>(i), prompts[i], tokenizer, options, pool);
  }
  if (options.max_new_tokens > 0) {
    try {
      // A model may have more rows than its tokenizer has tokens.
      const std::int64_t vocab_size = tokenizer == nullptr
                                          ? model.config().vocab_size
                                          : std::min(model.config().vocab_size, tokenizer->vocab_size());
      decode_all(ctx, model, vocab_size, options, all, result);
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::interrupted) throw;
      for (Decoding& d : all) d.end(FinishReason::interrupted);
    }
  }
  for (Decoding& d : all) {
    result.new_tokens += static_cast<std::int64_t>(d.result.logprobs.size());
    result.sequences.push_back(std::move(d.result));
  }
  return result;
}

}  // namespace krait
