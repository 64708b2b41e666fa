// LanguageModel: embedding -> backbone -> head. The backbone is upstream's mixer model (Mamba-1, Mamba-2,
// attention, MLPs in any order) or GPT-NeoX.
//
//   Context ctx;
//   LanguageModel model = load_language_model(ctx, open_model("state-spaces/mamba-130m"));   // load.h
//   State state = model.new_state();
//   Tensor logits = model.logits(ctx, prompt_ids, state);       // (1, V): after the last token
//   logits = model.logits(ctx, {&next_id, 1}, state);           // one step on top
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "krait/models/config.h"
#include "krait/modules/batch.h"
#include "krait/modules/parameter.h"

namespace krait {

class Backbone {
 public:
  virtual ~Backbone() = default;
  // Embedded tokens (T, d_model), which it may overwrite -> final normed hidden states (T, d_model).
  virtual Tensor forward(Context& ctx, Tensor hidden, const Batch& batch) const = 0;
  [[nodiscard]] virtual std::vector<LayerStateShape> state_shapes() const = 0;
  virtual void visit(const ParameterVisitor& visitor) = 0;
  // Draws layer by layer and calls `done` after each, so that a caller may convert as it goes.
  virtual void initialize(Rng& rng, const std::function<void()>& done) = 0;
  virtual void prepare() = 0;
};

// Tokens of one sequence, on top of its state (which they advance), or from an empty one.
struct Sequence {
  std::span<const std::int64_t> ids;
  State* state = nullptr;
};

enum class LogitRows : std::uint8_t {
  last,  // (n, V): one row for each sequence
  all,   // (T, V): every token, sequences one after the other
};

class LanguageModel {
 public:
  // Parameters are absent until initialize() or load_language_model().
  explicit LanguageModel(const ModelConfig& config);

  [[nodiscard]] const ModelConfig& config() const { return config_; }

  // Draws fresh parameters as the field initialises them; matrices in `dtype`. The same seed gives the
  // same parameters.
  void initialize(std::uint64_t seed, DType dtype = DType::f32);
  // Every parameter by its checkpoint name. After changing any, call prepare().
  void visit(const ParameterVisitor& visitor);
  void prepare();

  // Room for the states of `capacity` sequences that run as one batch.
  [[nodiscard]] std::shared_ptr<StatePool> make_pool(std::int64_t capacity = 1) const;
  [[nodiscard]] State new_state() const { return State(make_pool()); }

  // Logits in f32, V = padded_vocab_size: rows that pad the head included. States must belong to one
  // pool; either all sequences have one or none. Long inputs run in passes of bounded memory. Throws,
  // with the states unchanged, where an id is outside [0, vocab_size) or a sequence is empty.
  Tensor logits(Context& ctx, std::span<const Sequence> sequences, LogitRows rows = LogitRows::last) const;
  Tensor logits(Context& ctx, std::span<const std::int64_t> ids, State& state,
                LogitRows rows = LogitRows::last) const;

  // The final hidden states of `sequences`, pass by pass, without a head: for callers that need them in
  // pieces (scoring). `begins[i]` is the place in its sequence of the first token of batch sequence i.
  struct Pass {
    const Tensor& hidden;                    // (T, d_model)
    const Batch& batch;                      // sequences of this pass
    std::span<const std::int64_t> sequence;  // which input each batch sequence belongs to
    std::span<const std::int64_t> begins;
  };
  void for_each_pass(Context& ctx, std::span<const Sequence> sequences,
                     const std::function<void(const Pass&)>& visit) const;
  // (T, d_model) -> (T, V)
  Tensor head(Context& ctx, const Tensor& hidden) const;
  [[nodiscard]] const Tensor& head_weight() const;

 private:
  void check(std::span<const Sequence> sequences) const;
  void run_passes(Context& ctx, std::span<const Sequence> sequences, std::size_t offset,
                  const std::function<void(const Pass&)>& visit) const;

  ModelConfig config_;
  std::int64_t pass_tokens_;
  Tensor embedding_;  // (V, d_model)
  Tensor lm_head_;    // (V, d_model), absent where tied
  std::unique_ptr<Backbone> backbone_;
};

}  // namespace krait
