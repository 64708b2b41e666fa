#include "krait/train/train.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "krait/core/error.h"
#include "krait/eval/score.h"
#include "krait/generate/generate.h"
#include "krait/io/atomic_file.h"
#include "krait/io/safetensors.h"
#include "krait/train/trainer.h"
#include "train/checkpoint.h"
#include "train/run_directory.h"
#include "train/run_record.h"
#include "train/source.h"
#include "train/step_memory.h"
#include "train/validation.h"

namespace krait {
namespace fs = std::filesystem;
namespace {

constexpr const char* kSettings = "settings.json";
constexpr const char* kAverage = "average.safetensors";
constexpr const char* kModel = "model.safetensors";

// What transformers asks of a file.
const io::Metadata kMetadata{{"format", "pt"}};

// Weights of the best evaluation, by its step: those that a checkpoint knows of stay where they are while
// newer ones come.
std::string best_name(std::int64_t step) { return concat("best-", step, ".safetensors"); }

bool is_best_name(std::string_view name) {
  constexpr std::string_view kBegin = "best-";
  constexpr std::string_view kEnd = ".safetensors";
  if (!name.starts_with(kBegin) || !name.ends_with(kEnd) || name.size() <= kBegin.size() + kEnd.size())
    return false;
  name = name.substr(kBegin.size(), name.size() - kBegin.size() - kEnd.size());
  return name.find_first_not_of("0123456789") == std::string_view::npos;
}

void require_unchanged(TrainSettings before, TrainSettings now, const std::string& directory) {
  const std::vector<Setting> old_table = settings_table(before);
  const std::vector<Setting> new_table = settings_table(now);
  for (std::size_t i = 0; i < old_table.size(); ++i) {
    const std::string was = value_text(old_table[i]);
    const std::string is = value_text(new_table[i]);
    require(!old_table[i].fixed || was == is, old_table[i].name, " is ", is, ", but the run in ", directory,
            " was started with ", was);
  }
}

// The name of a tensor that holds infinity or NaN, where there is one.
std::optional<std::string> first_not_finite(const io::TensorMap& tensors) {
  for (const auto& [name, tensor] : tensors) {
    const Tensor values = tensor.contiguous();
    const auto span = values.span<float>();
    if (!std::all_of(span.begin(), span.end(), [](float x) { return std::isfinite(x); })) return name;
  }
  return std::nullopt;
}

bool same_end(const TrainSettings& a, const TrainSettings& b) {
  return a.steps == b.steps && a.epochs == b.epochs && a.patience == b.patience;
}

std::vector<fs::path> paths_of(const std::vector<std::string>& names) { return {names.begin(), names.end()}; }

// A line of metrics.jsonl or samples.jsonl that the checkpoint knows of.
bool is_before(std::string_view line, const RunState& state) {
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) return false;
  const std::int64_t last = json.contains("val_loss") ? state.evaluated
                            : json.contains("text")   ? state.sampled
                                                      : state.trainer.step;
  return json["step"].get<std::int64_t>() <= last;
}

class Run {
 public:
  Run(Context& ctx, const TrainSettings& settings, const TrainOptions& options, RunDirectory& directory,
      const CheckpointStore& store, const std::optional<Checkpoint>& checkpoint)
      : ctx_(ctx),
        settings_(settings),
        options_(options),
        directory_(directory),
        store_(store),
        source_(checkpoint
                    ? open_checkpoint_source(ctx, settings, store.path_of(checkpoint->state.trainer.step))
                    : open_source(ctx, settings, options)),
        data_(open_data()),
        validation_(ctx, settings.val, tokenizer(), data_->seq_len(), source_.model.config().vocab_size),
        trainer_(ctx, source_.model, *data_, settings) {
    require(settings.sample_every == 0 || source_.tokenizer.has_value(), "sample_every is ",
            settings.sample_every, ", but the model has no tokenizer");
    require(settings.sample_every == 0 || !source_.tokenizer->encode(settings.sample_prompt).empty(),
            "sample_prompt has no tokens, expected at least one");
    if (checkpoint) {
      state_ = checkpoint->state;
      state_.finished = false;
      saved_ = state_.trainer.step;
      saved_best_ = state_.best_step;
      trainer_.restore(state_.trainer, checkpoint->tensors, store.path_of(saved_).string());
      const fs::path best = directory / best_name(saved_best_);
      require(settings.export_weights != Export::best || saved_best_ < 0 || fs::exists(best), best.string(),
              ": is missing, expected the weights of the best evaluation up to ",
              store.path_of(saved_).string());
    }
  }

  TrainResult run() {
    begin_directory();
    record_.emplace(directory_, options_, trainer_.step_number());
    if (options_.on_start)
      options_.on_start({.steps = trainer_.steps(),
                         .first_step = trainer_.step_number(),
                         .parameters = trainer_.parameters(),
                         .data_tokens = data_->tokens(),
                         .batches_per_epoch = data_->batches_per_epoch()});
    RunEnd end = RunEnd::finished;
    for (;;) {
      const bool stop_now = !look();
      const std::int64_t step = trainer_.step_number();
      const bool early = settings_.patience > 0 && state_.evaluations_since_best >= settings_.patience;
      if (!stop_now && (early || step >= trainer_.steps())) {
        end = early && step < trainer_.steps() ? RunEnd::stopped_early : RunEnd::finished;
        break;
      }
      // Weights that give nothing finite are not worth a checkpoint, unless there is no later.
      const bool wanted = settings_.save_every > 0 && step % settings_.save_every == 0 && step > 0 &&
                          trainer_.state().skipped_in_a_row == 0;
      const bool stop = stop_now || (options_.stop && options_.stop());
      if ((wanted || stop) && saved_ != step) save();
      if (stop) return result(RunEnd::interrupted);
      train_step();
    }
    if (finish()) return result(end);
    if (saved_ != trainer_.step_number()) save();
    return result(RunEnd::interrupted);
  }

 private:
  [[nodiscard]] std::unique_ptr<Dataset> open_data() const {
    const ModelConfig& config = source_.model.config();
    const DatasetOptions options = dataset_options(settings_, config);
    require_step_fits(config, options, settings_.accumulate, machine_memory());
    return Dataset::open(ctx_, paths_of(settings_.data), tokenizer(), options);
  }

  [[nodiscard]] const Tokenizer* tokenizer() const {
    return source_.tokenizer ? &*source_.tokenizer : nullptr;
  }

  void begin_directory() {
    // The settings first: with them the directory is a run, and can be resumed.
    io::write_file(directory_ / kSettings, settings_json(settings_));
    write_texts(directory_.path(), source_.texts);
    const auto keep = [&](std::string_view line) { return saved_ >= 0 && is_before(line, state_); };
    RunRecord::filter(directory_, keep);
    remove_old_best();
  }

  void train_step() {
    const std::int64_t tokens_before = trainer_.state().tokens;
    const double seconds_before = trainer_.state().seconds;
    StepReport report = trainer_.step();
    line_tokens_ += report.tokens - tokens_before;
    line_seconds_ += report.seconds - seconds_before;
    if (options_.on_step) options_.on_step(report);
    if (report.step % settings_.log_every != 0 && report.step != trainer_.steps() && !report.was_skipped)
      return;
    report.tokens_per_second = static_cast<double>(line_tokens_) / line_seconds_;
    line_tokens_ = 0;
    line_seconds_ = 0.0;
    record_->add(report);
    if (report.was_skipped)
      ctx_.warn(concat("step ", report.step, ": loss ", report.loss, ", gradient norm ", report.grad_norm,
                       ": not finite, weights stay as they are"));
  }

  [[nodiscard]] bool due(std::int64_t every, std::int64_t last) const {
    const std::int64_t step = trainer_.step_number();
    return step > 0 && step != last && ((every > 0 && step % every == 0) || step >= trainer_.steps());
  }

  // Evaluation and sample of the step, where they are due. False where the caller asked to stop meanwhile:
  // they are made when the run goes on.
  bool look() {
    try {
      if (!validation_.empty() && due(settings_.eval_every, state_.evaluated)) evaluate();
      if (settings_.sample_every > 0 && due(settings_.sample_every, state_.sampled)) sample();
      return true;
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::interrupted) throw;
      return false;
    }
  }

  void evaluate() {
    EvaluationReport report{.step = trainer_.step_number()};
    trainer_.with_weights(Trainer::Weights::last, [&] {
      const auto result = validation_.evaluate(ctx_, source_.model);
      report.loss = result.loss;
      report.bits_per_byte = result.bits_per_byte;
    });
    double loss = report.loss;
    if (settings_.ema > 0.0) {
      trainer_.with_weights(Trainer::Weights::average, [&] {
        const auto result = validation_.evaluate(ctx_, source_.model);
        loss = result.loss;
        report.average_loss = result.loss;
        report.average_bits_per_byte = result.bits_per_byte;
      });
    }
    report.best = std::isfinite(loss) && (state_.best_step < 0 || loss < state_.best_loss);
    report.seconds = trainer_.state().seconds;
    if (report.best) {
      if (settings_.export_weights == Export::best)
        io::write_safetensors(
            directory_ / best_name(report.step),
            trainer_.weights(settings_.ema > 0.0 ? Trainer::Weights::average : Trainer::Weights::last),
            kMetadata);
      state_.best_loss = loss;
      state_.best_step = report.step;
      state_.evaluations_since_best = 0;
      remove_old_best();
    } else {
      ++state_.evaluations_since_best;
    }
    record_->add(report);
    state_.evaluated = report.step;
  }

  void sample() {
    SampleReport report{.step = trainer_.step_number()};
    const std::vector<std::vector<std::int64_t>> prompts{tokenizer()->encode(settings_.sample_prompt)};
    trainer_.with_weights(settings_.ema > 0.0 ? Trainer::Weights::average : Trainer::Weights::last, [&] {
      const GenerateResult result = generate(
          ctx_, source_.model, tokenizer(), prompts,
          {.max_new_tokens = settings_.sample_tokens,
           .seed = static_cast<std::uint64_t>(settings_.seed) + static_cast<std::uint64_t>(report.step)});
      if (result.sequences[0].finish == FinishReason::interrupted)
        fail(ErrorKind::interrupted, "the sample was interrupted");
      report.text = settings_.sample_prompt + result.sequences[0].text;
    });
    record_->add(report);
    state_.sampled = report.step;
  }

  void save() {
    state_.trainer = trainer_.state();
    // After a step that was skipped the weights may be good for nothing: what is older stays.
    const std::int64_t keep = state_.trainer.skipped_in_a_row == 0 ? settings_.keep : 0;
    store_.save({.state = state_, .tensors = trainer_.snapshot()}, source_.texts, keep);
    saved_ = state_.trainer.step;
    saved_best_ = state_.best_step;
    remove_old_best();
    if (options_.on_checkpoint) options_.on_checkpoint(store_.path_of(saved_));
  }

  // Removes the best weights of which neither the newest checkpoint knows nor the run as it is now.
  void remove_old_best() const {
    std::vector<fs::path> old;
    for (const auto& entry : fs::directory_iterator(directory_.path())) {
      const std::string name = entry.path().filename().string();
      if (is_best_name(name) && name != best_name(saved_best_) && name != best_name(state_.best_step))
        old.push_back(entry.path());
    }
    for (const fs::path& path : old) fs::remove(path);
  }

  // Leaves the model. The checkpoint that says so comes last. False where the caller asked to stop meanwhile.
  bool finish() {
    const bool wants_best = settings_.export_weights == Export::best;
    const bool has_best = wants_best && state_.best_step >= 0;
    if (wants_best && !has_best) ctx_.warn("no evaluation was finite: the model is that of the last step");
    const auto which =
        settings_.export_weights == Export::average ? Trainer::Weights::average : Trainer::Weights::last;
    const io::TensorMap weights =
        has_best ? io::read_safetensors(directory_ / best_name(state_.best_step)) : trainer_.weights(which);
    if (const auto bad = first_not_finite(weights)) fail_unsound(concat("are not finite (", *bad, ")"));
    // The best have been evaluated.
    if (!has_best && !try_out(which)) return false;

    const io::TensorMap average = trainer_.weights(Trainer::Weights::average);
    if (const auto bad = first_not_finite(average))
      ctx_.warn(concat(kAverage, " is not written: averaged weights are not finite (", *bad, ")"));
    else if (!average.empty())
      io::write_safetensors(directory_ / kAverage, average, kMetadata);
    io::write_safetensors(directory_ / kModel, weights, kMetadata);
    state_.finished = true;
    save();
    return true;
  }

  // Throws where the weights that the run would leave give no finite loss: the last update may have spoilt
  // them, and no step has seen them since. False where the caller asked to stop meanwhile.
  bool try_out(Trainer::Weights which) {
    const TrainerState state = trainer_.state();
    require(state.updates > 0, "no step had a finite loss and gradient norm: no model is written");
    TrainingBatch batch;
    data_->fill(state.batches - settings_.accumulate * (state.skipped_in_a_row + 1), batch);
    // Fixed batches may be of one token and its target, which is no text to score.
    if (data_->seq_len() >= 2) {
      try {
        trainer_.with_weights(which, [&] {
          const Score score = score_ids(ctx_, source_.model, batch.inputs.slice(0, 0, 1));
          if (!std::isfinite(score.loss)) fail_unsound("give no finite loss");
        });
      } catch (const Error& error) {
        if (error.kind() != ErrorKind::interrupted) throw;
        return false;
      }
    }
    if (state.skipped_in_a_row > 0)
      ctx_.warn(concat("the last ", state.skipped_in_a_row, " of ", state.step,
                       " steps were skipped: the model is that of step ", weights_step()));
    return true;
  }

  // The step that changed the weights last.
  [[nodiscard]] std::int64_t weights_step() const {
    return trainer_.step_number() - trainer_.state().skipped_in_a_row;
  }

  [[noreturn]] void fail_unsound(const std::string& what) const {
    fail(ErrorKind::invalid_argument, "the weights after step ", weights_step(), " ", what,
         ": no model is written (a lower lr or a longer warmup may help)");
  }

  [[nodiscard]] TrainResult result(RunEnd end) const {
    return {.end = end,
            .steps = trainer_.step_number(),
            .best_step = state_.best_step,
            .best_loss = state_.best_loss,
            .seconds = trainer_.state().seconds};
  }

  Context& ctx_;
  const TrainSettings& settings_;
  const TrainOptions& options_;
  RunDirectory& directory_;
  const CheckpointStore& store_;
  Source source_;
  std::unique_ptr<Dataset> data_;
  ValidationSet validation_;
  Trainer trainer_;
  RunState state_;
  std::int64_t saved_ = -1;       // step of the newest checkpoint
  std::int64_t saved_best_ = -1;  // its best_step
  std::optional<RunRecord> record_;
  std::int64_t line_tokens_ = 0;  // since the last line of metrics
  double line_seconds_ = 0.0;
};

}  // namespace

std::optional<TrainSettings> settings_of_run(const fs::path& directory) {
  const fs::path file = directory / kSettings;
  if (!fs::exists(file)) return std::nullopt;
  TrainSettings settings;
  read_settings(file, settings);
  return settings;
}

TrainResult train(Context& ctx, const TrainSettings& settings, const TrainOptions& options) {
  check_settings(settings);
  RunDirectory directory(settings.out, options.resume);
  const CheckpointStore store(directory / "checkpoints");
  std::optional<Checkpoint> checkpoint;
  if (directory.holds_run()) checkpoint = store.load_newest();
  if (checkpoint) {
    const TrainSettings before = settings_of_run(directory.path()).value_or(settings);
    require_unchanged(before, settings, settings.out);
    if (checkpoint->state.finished && same_end(before, settings))
      return {.end = RunEnd::already_finished,
              .steps = checkpoint->state.trainer.step,
              .best_step = checkpoint->state.best_step,
              .best_loss = checkpoint->state.best_loss,
              .seconds = checkpoint->state.trainer.seconds};
  }
  return Run(ctx, settings, options, directory, store, checkpoint).run();
}

}  // namespace krait
