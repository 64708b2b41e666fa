#include "krait/generate/generate.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>

#include "generate/row_sampler.h"
#include "krait/core/error.h"
#include "krait/models/stepper.h"
#include "krait/ops/embedding.h"

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

// The rows of logits that `keep` lists in ascending order.
Tensor rows_of(Context& ctx, const Tensor& logits, const std::vector<std::int64_t>& keep) {
  if (static_cast<std::int64_t>(keep.size()) == logits.size(0)) return logits;
  return embedding(ctx,
                   {.ids = ctx.to_device(Tensor::from(keep)), .weight = logits, .out_dtype = logits.dtype()});
}

// Steps and draws of what is active. On a GPU the draws are made where the logits are, and the next step is
// queued before the host knows them: it is in vain for the sequences that end with them.
class Decoder {
 public:
  Decoder(Context& ctx, const LanguageModel& model, std::int64_t vocab_size, const GenerateOptions& options)
      : ctx_(ctx),
        model_(model),
        vocab_size_(vocab_size),
        options_(options),
        stepper_(ctx, model),
        sampler_(ctx, options.sampling, options.seed, vocab_size) {}

  void prefill(std::span<Decoding* const> active) {
    std::vector<Sequence> inputs;
    for (Decoding* d : active) inputs.push_back({.ids = d->result.ids, .state = &d->state});
    logits_ = model_.logits(ctx_, inputs);
    begin_draw(active);
  }

  // The next token of each; those that end with it leave `active`.
  void take(std::vector<Decoding*>& active) {
    std::vector<Sample> samples;
    ahead_ = stepper_.steps_ahead() && goes_on(active);
    std::exception_ptr interrupted;
    if (ahead_) {
      try {
        logits_ = stepper_.step(sampler_.ids(), states_of(active));
      } catch (const Error& e) {
        if (e.kind() != ErrorKind::interrupted) throw;
        interrupted = std::current_exception();  // behind the draws that are on their way
      }
    }
    if (ctx_.on_gpu()) {
      samples = sampler_.finish();
    } else {
      for (std::size_t i = 0; i < active.size(); ++i)
        samples.push_back(
            active[i]->draw(logits_.select(0, static_cast<std::int64_t>(i)).span<float>(), vocab_size_));
    }
    std::vector<std::int64_t> keep;
    for (std::size_t i = 0; i < active.size(); ++i) {
      active[i]->take(samples[i], model_.config());
      if (!active[i]->done()) keep.push_back(static_cast<std::int64_t>(i));
    }
    std::erase_if(active, [](const Decoding* d) { return d->done(); });
    if (interrupted) std::rethrow_exception(interrupted);
    if (ahead_ && !active.empty()) logits_ = rows_of(ctx_, logits_, keep);
  }

  // The logits behind the last token of each.
  void advance(std::span<Decoding* const> active) {
    if (!ahead_) {
      std::vector<std::int64_t> ids;
      for (const Decoding* d : active) ids.push_back(d->result.ids.back());
      logits_ = stepper_.step(ids, states_of(active));
    }
    begin_draw(active);
  }

 private:
  static std::vector<State*> states_of(std::span<Decoding* const> active) {
    std::vector<State*> states;
    for (Decoding* d : active) states.push_back(&d->state);
    return states;
  }
  // All have as many tokens.
  [[nodiscard]] bool goes_on(std::span<Decoding* const> active) const {
    return static_cast<std::int64_t>(active[0]->result.logprobs.size()) + 1 < options_.max_new_tokens;
  }
  void begin_draw(std::span<Decoding* const> active) {
    if (!ctx_.on_gpu()) return;
    std::vector<std::int64_t> sequences;
    std::vector<std::span<const std::int64_t>> previous;
    for (const Decoding* d : active) {
      sequences.push_back(d->index());
      previous.emplace_back(d->result.ids);
    }
    sampler_.begin(logits_, sequences, previous);
  }

  Context& ctx_;
  const LanguageModel& model_;
  std::int64_t vocab_size_;
  const GenerateOptions& options_;
  Stepper stepper_;
  RowSampler sampler_;
  Tensor logits_;
  bool ahead_ = false;  // logits_ are those behind the tokens that take() took
};

void decode_all(Context& ctx, const LanguageModel& model, std::int64_t vocab_size,
                const GenerateOptions& options, std::span<Decoding> all, GenerateResult& result) {
  auto begin = std::chrono::steady_clock::now();
  std::vector<Decoding*> active;
  for (Decoding& d : all) active.push_back(&d);
  Decoder decoder(ctx, model, vocab_size, options);
  if (active.empty()) return;
  decoder.prefill(active);
  decoder.take(active);
  result.prefill_seconds = seconds_since(begin);
  begin = std::chrono::steady_clock::now();
  while (!active.empty()) {
    decoder.advance(active);
    decoder.take(active);
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
