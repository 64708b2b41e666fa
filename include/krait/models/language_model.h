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
#include "krait/modules/tape.h"
#include "krait/ops/cross_entropy.h"

namespace krait {

class Backbone {
 public:
  virtual ~Backbone() = default;
  // Embedded tokens (T, d_model), which it may overwrite -> final normed hidden states (T, d_model).
  // With a tape, keeps on it what backward reads.
  virtual Tensor forward(Context& ctx, Tensor hidden, const Batch& batch, Tape* tape = nullptr) const = 0;
  // A batch that is_step(), embedded as in forward, to the head's logits (n, V) of what forward would return.
  virtual void step(Context& ctx, const Tensor& hidden, const Batch& batch, const Tensor& head_weight,
                    const Tensor& logits) const;
  // The same from ids (1) on the device, in one kernel (decode_step). False, with nothing done, where that is
  // not made for the model or the device.
  virtual bool step_at_once(Context& /*ctx*/, const Tensor& /*ids*/, const Tensor& /*embedding*/,
                            const Batch& /*batch*/, const Tensor& /*head_weight*/,
                            const Tensor& /*logits*/) const {
    return false;
  }
  // Gradient of the result of forward (T, d_model) -> gradient of its input. Adds to the
  // gradients of parameters that have one.
  virtual Tensor backward(Context& ctx, const Tensor& dout, const Batch& batch, Tape& tape) const = 0;
  [[nodiscard]] virtual std::vector<LayerStateShape> state_shapes() const = 0;
  virtual void visit(const ParameterVisitor& visitor) = 0;
  // Draws layer by layer and calls `done` after each, so that a caller may convert as it goes.
  virtual void initialize(Rng& rng, const std::function<void()>& done) = 0;
  virtual void prepare(Context& ctx) = 0;
};

// Tokens of one sequence, on top of its state (which they advance), or from an empty one.
struct Sequence {
  std::span<const std::int64_t> ids;
  State* state = nullptr;
};

// A batch to train on: B rows of L tokens.
struct TrainingBatch {
  static constexpr std::int64_t kNoLoss = -100;
  Tensor inputs;   // (B, L) i64
  Tensor targets;  // (B, L) i64, what follows each input; kNoLoss where nothing is to be learnt
  Tensor seq_idx;  // (B, L) i32, optional: states do not pass between tokens of different numbers
  // Optional: row i starts from the state in row i of the pool and leaves its last state there (truncated
  // back-propagation through time). Not with attention layers.
  std::shared_ptr<StatePool> states;
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
  void prepare(Context& ctx);
  // Moves all parameters to the context's device, where they are not there yet. Gradients are dropped.
  void to_device(Context& ctx);

  // Room for the states of `capacity` sequences that run as one batch, on the device of the parameters.
  [[nodiscard]] const Memory& memory() const { return memory_; }
  // `state_dtype`: what SSM states are kept as between steps; see StatePool::create.
  [[nodiscard]] std::shared_ptr<StatePool> make_pool(std::int64_t capacity = 1,
                                                     DType state_dtype = DType::f32) const;
  [[nodiscard]] State new_state() const { return State(make_pool()); }

  // Logits in f32 on the context's device, V = padded_vocab_size: rows that pad the head included. States
  // must belong to one pool; either all sequences have one or none. Long inputs run in passes of bounded
  // memory. Throws, with the states unchanged, where an id is outside [0, vocab_size) or a sequence is empty.
  Tensor logits(Context& ctx, std::span<const Sequence> sequences, LogitRows rows = LogitRows::last) const;
  Tensor logits(Context& ctx, std::span<const std::int64_t> ids, State& state,
                LogitRows rows = LogitRows::last) const;

  // What a Stepper records: one token for each sequence, ids (n) i64 on the device, of a Batch::of_steps. The
  // states are not advanced. logits (n, V) f32 is written.
  void step(Context& ctx, const Tensor& ids, const Batch& batch, const Tensor& logits) const;
  // Whether a step is the same work for every position (it is not with keys and values).
  [[nodiscard]] bool steps_can_be_recorded() const;
  // Throws what logits() would throw for these sequences.
  void check(std::span<const Sequence> sequences) const;

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

  // Training. Gradients are absent until zero_gradients(), which makes f32 ones for every parameter, or sets
  // them to 0; weights must be in memory that may be written (initialize(), or load with a conversion, or
  // own_parameters()).
  void zero_gradients(Context& ctx);
  void drop_gradients();
  // Copies all parameters into memory of the context, which may be written (that of a mapped file may not).
  void own_parameters(Context& ctx);
  // Forward and backward of one batch: adds `scale` times the gradient of the sum of losses to the gradients
  // of all parameters. Returns the losses. Throws where an id or target is outside of the vocabulary.
  CrossEntropyResult accumulate_gradients(Context& ctx, const TrainingBatch& batch, Tape& tape, double scale);

 private:
  [[nodiscard]] DType activation_dtype(const Context& ctx) const;
  void run_passes(Context& ctx, std::span<const Sequence> sequences, std::size_t offset,
                  const std::function<void(const Pass&)>& visit) const;

  ModelConfig config_;
  Memory memory_;     // of the parameters, and so of states
  Tensor embedding_;  // (V, d_model)
  Tensor lm_head_;    // (V, d_model), absent where tied
  Tensor dembedding_;
  Tensor dlm_head_;
  std::vector<Tensor> gradient_blocks_;  // memory of the gradients that zero_gradients() has made
  std::unique_ptr<Backbone> backbone_;
};

}  // namespace krait
