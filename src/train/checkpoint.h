// Checkpoints: DIR/checkpoints/step-N, a directory with
//   model.safetensors      f32 weights, by the model's own names
//   optimizer.safetensors  "m.NAME", "v.NAME"; "average.NAME" with a moving average; "state.I.conv" and
//                          "state.I.ssm" of layer I where states are carried from batch to batch
//   state.json             RunState
//   config.json, tokenizer.json: so that the directory is a model
// It is written under a hidden name, flushed to disk, and renamed: a directory with this name is whole.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "krait/train/trainer.h"

namespace krait {

// How far a run has come.
struct RunState {
  TrainerState trainer;
  std::int64_t evaluated = -1;  // step of the last evaluation, and of the last sample
  std::int64_t sampled = -1;
  double best_loss = 0.0;  // of the best evaluation
  std::int64_t best_step = -1;
  std::int64_t evaluations_since_best = 0;
  bool finished = false;
};

struct CheckpointTexts {
  std::string config_json;
  std::string tokenizer_json;          // empty: none
  std::string generation_config_json;  // likewise
};

struct Checkpoint {
  RunState state;
  Trainer::Snapshot tensors;
};

class CheckpointStore {
 public:
  // `path` is DIR/checkpoints, made when the first checkpoint is written. Removes what a killed process
  // left half written.
  explicit CheckpointStore(std::filesystem::path path);

  // Steps of the checkpoints that are there, ascending.
  [[nodiscard]] std::vector<std::int64_t> steps() const;
  [[nodiscard]] std::filesystem::path path_of(std::int64_t step) const;

  // Writes a checkpoint; then removes all but the `keep` newest (0: none).
  void save(const Checkpoint& checkpoint, const CheckpointTexts& texts, std::int64_t keep) const;
  // The newest; nothing where there is none. Throws where it cannot be read.
  [[nodiscard]] std::optional<Checkpoint> load_newest() const;

 private:
  void remove(std::int64_t step) const;

  std::filesystem::path path_;
};

// The texts as files of a model directory.
void write_texts(const std::filesystem::path& directory, const CheckpointTexts& texts);

}  // namespace krait
