// train: a whole training run, from settings to a model in a directory. `krait train` is this function.
//
//   Context ctx;
//   TrainSettings settings;
//   read_settings("settings.toml", settings);
//   train(ctx, settings, {.on_step = [](const StepReport& r) { std::cout << json_line(r); }});
//
// The directory settings.out then holds model.safetensors, config.json and tokenizer.json (a model for
// open_model), settings.json, metrics.jsonl, samples.jsonl and checkpoints/step-N. docs/training.md describes
// each.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "krait/core/context.h"
#include "krait/models/load.h"
#include "krait/train/metrics.h"
#include "krait/train/settings.h"

namespace krait {

// What a run is about to do.
struct RunStart {
  std::int64_t steps = 0;
  std::int64_t first_step = 0;  // done before: the checkpoint that the run goes on from
  std::int64_t parameters = 0;
  std::int64_t data_tokens = 0;
  std::int64_t batches_per_epoch = 0;
};

struct TrainOptions {
  // Go on from the newest checkpoint in settings.out, or begin where there is none.
  bool resume = false;
  // Asked between steps; true ends the run with a checkpoint. (A context's `cancelled` moreover ends
  // evaluations and samples early; they are made again when the run goes on.)
  std::function<bool()> stop;
  // Opens settings.model; absent: open_model.
  std::function<ModelFiles(const std::string&)> open_model;

  std::function<void(const RunStart&)> on_start;
  std::function<void(const StepReport&)> on_step;  // every step
  std::function<void(const StepReport&)> on_log;   // those that are written to metrics.jsonl
  std::function<void(const EvaluationReport&)> on_evaluation;
  std::function<void(const SampleReport&)> on_sample;
  std::function<void(const std::filesystem::path&)> on_checkpoint;
};

enum class RunEnd : std::uint8_t {
  finished,
  stopped_early,     // by settings.patience
  interrupted,       // by options.stop
  already_finished,  // resume found nothing to do and changed nothing
};

struct TrainResult {
  RunEnd end = RunEnd::finished;
  std::int64_t steps = 0;       // done
  std::int64_t best_step = -1;  // of the best evaluation, where there was one
  double best_loss = 0.0;
  double seconds = 0.0;
};

// Throws Error with one line where settings, data, model or directory are not what they should be (nothing is
// overwritten), where the disk is full, and where ten steps in a row are not finite or the weights that would
// be left as the model give no finite loss: the last checkpoint is intact then.
TrainResult train(Context& ctx, const TrainSettings& settings, const TrainOptions& options = {});

// The settings that the run in a directory was started with; nothing where there is no run.
std::optional<TrainSettings> settings_of_run(const std::filesystem::path& directory);

}  // namespace krait
