// Trainer: the steps of a training run on a model and its data, in memory.
//
//   Context ctx;
//   TrainSettings settings{.steps = 1000, .batch_size = 8, .seq_len = 256, .lr = 3e-3, .warmup = 50};
//   LanguageModel model(parse_config(json, "config.json"));
//   model.initialize(settings.seed);
//   const auto data = Dataset::open(ctx, {"books.txt"}, &tokenizer, dataset_options(settings,
//   model.config())); Trainer trainer(ctx, model, *data, settings); while (trainer.step_number() <
//   trainer.steps()) std::cout << json_line(trainer.step());
//
// train() in train.h adds what a run needs around it: directory, checkpoints, evaluation, samples.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "krait/core/context.h"
#include "krait/io/tensor_file.h"
#include "krait/models/language_model.h"
#include "krait/train/dataset.h"
#include "krait/train/metrics.h"
#include "krait/train/settings.h"

namespace krait {

// How far a trainer has come, beside tensors. Order of the data and dropout are functions of the seed and of
// these counts.
struct TrainerState {
  std::int64_t step = 0;     // done, skipped ones included
  std::int64_t updates = 0;  // of the weights
  std::int64_t batches = 0;  // taken from the data
  std::int64_t tokens = 0;   // targets learnt from
  std::int64_t skipped = 0;
  std::int64_t skipped_in_a_row = 0;
  double seconds = 0.0;  // since the beginning of the run
  // What must be the same for a trainer that goes on.
  std::int64_t seed = 0;
  std::int64_t data_tokens = 0;
  std::int64_t data_checksum = 0;  // of a sample of the batches
};

// What settings say of the data; with sizes of 0 it looks into settings.data for fixed batches.
[[nodiscard]] DatasetOptions dataset_options(const TrainSettings& settings, const ModelConfig& config);

class Trainer {
 public:
  // The model must have f32 weights; it computes with copies of settings.dtype from here on. Model, data and
  // context must outlive the trainer. Of the settings those of steps, computation and optimizer are read.
  Trainer(Context& ctx, LanguageModel& model, const Dataset& data, const TrainSettings& settings);
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  // Steps of the whole run, and those that are done.
  [[nodiscard]] std::int64_t steps() const;
  [[nodiscard]] std::int64_t step_number() const;

  // One step: forward and backward of the batches of the step, clipping, AdamW, moving average. A step whose
  // loss or gradient norm is not finite takes its batches but leaves the weights, and carried states
  // begin anew. Throws Error(invalid_argument) where the ten steps before it were such steps.
  StepReport step();

  enum class Weights : std::uint8_t { last, average };
  // Calls `body` while the model has f32 weights: those of the last step, or their average.
  void with_weights(Weights which, const std::function<void()>& body);
  // Weights by name, not copied.
  [[nodiscard]] io::TensorMap weights(Weights which) const;

  // Everything that a later Trainer on the same data needs to go on, bit for bit, as this one would.
  // The tensors are not copied.
  struct Snapshot {
    io::TensorMap model;      // f32 weights
    io::TensorMap optimizer;  // moments, moving average, carried states
  };
  [[nodiscard]] Snapshot snapshot() const;
  [[nodiscard]] TrainerState state() const;
  // `name` stands in messages: where a tensor is missing or has another shape, where the data are not the
  // same.
  void restore(const TrainerState& state, const Snapshot& snapshot, const std::string& name);

  // Weights that are trained, and those of them that have weight decay.
  [[nodiscard]] std::int64_t parameters() const;
  [[nodiscard]] std::int64_t decayed_parameters() const;
  // What forward kept for backward, and how much there was of it at most.
  [[nodiscard]] const Tape& tape() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace krait
