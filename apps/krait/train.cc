// krait train: data in, model out.
#include "krait/train/train.h"

#include <algorithm>
#include <list>
#include <memory>
#include <optional>

#include "commands.h"
#include "input.h"
#include "json_object.h"
#include "krait/core/error.h"
#include "options.h"
#include "terminal.h"
#include "train_progress.h"

namespace krait::cli {
namespace {

// The options that are settings, as they stand on the command line.
class SettingOptions {
 public:
  explicit SettingOptions(const Command& command) : table_(settings_table(line_)) {
    for (const Setting& setting : table_)
      options_.push_back(
          std::visit([&](const auto& place) { return add(command, setting, place); }, setting.place));
  }
  SettingOptions(const SettingOptions&) = delete;
  SettingOptions& operator=(const SettingOptions&) = delete;

  // `settings` with what the command line says in its stead.
  void apply(TrainSettings& settings) const {
    std::vector<std::string> names;
    for (std::size_t i = 0; i < table_.size(); ++i)
      if (options_[i].given()) names.push_back(table_[i].name);
    for (const auto& [setting, text] : texts_) {
      if (std::find(names.begin(), names.end(), setting->name) == names.end()) continue;
      try {
        set_from_text(*setting, text);
      } catch (const Error& error) {
        throw UsageError(concat(flag_of(*setting), ": ", error.what()));
      }
    }
    override_settings(settings, line_, names);
  }

 private:
  static std::string flag_of(const Setting& setting) {
    std::string flag = "--" + setting.name;
    for (char& c : flag) c = c == '_' ? '-' : c;
    return flag;
  }

  Option add(const Command& command, const Setting& setting, bool* place) {
    return command.flag(flag_of(setting), *place, setting.description);
  }
  Option add(const Command& command, const Setting& setting, const Setting::Integer& place) {
    return command.integer(flag_of(setting), *place.value, place.low, place.high, setting.description);
  }
  Option add(const Command& command, const Setting& setting, const Setting::Number& place) {
    return command.number(flag_of(setting), *place.value, place.low, place.high, setting.description);
  }
  Option add(const Command& command, const Setting& setting, const Setting::Choice& place) {
    std::string& text = text_for(setting, place.get());
    return command.choice(flag_of(setting), text, place.names, setting.description);
  }
  Option add(const Command& command, const Setting& setting, std::string* place) {
    return command.text(flag_of(setting), *place, setting.type, setting.description);
  }
  Option add(const Command& command, const Setting& setting, std::vector<std::string>* place) {
    if (!setting.commas)
      return command.texts(flag_of(setting), *place, setting.type, /*greedy=*/true, setting.description);
    std::string shown;
    for (const std::string& item : *place) shown += (shown.empty() ? "" : ",") + item;
    return command.text(flag_of(setting), text_for(setting, shown), setting.type, setting.description)
        .shows_default(shown);
  }
  Option add(const Command& command, const Setting& setting, std::vector<double>* place) {
    std::string shown;
    for (const double item : *place) shown += (shown.empty() ? "" : ",") + concat(item);
    return command.text(flag_of(setting), text_for(setting, shown), setting.type, setting.description)
        .shows_default(shown);
  }

  std::string& text_for(const Setting& setting, const std::string& value) {
    return texts_.emplace_back(&setting, value).second;
  }

  TrainSettings line_;
  std::vector<Setting> table_;
  std::list<std::pair<const Setting*, std::string>> texts_;  // of options that are read after parsing
  std::vector<Option> options_;
};

struct Options {
  explicit Options(const Command& command) : settings(command) {}

  SettingOptions settings;
  CommonOptions common;
  std::string file;
  bool resume = false;
  bool json = false;
};

std::string_view name_of(RunEnd end) {
  switch (end) {
    case RunEnd::finished: return "finished";
    case RunEnd::stopped_early: return "stopped_early";
    case RunEnd::interrupted: return "interrupted";
    case RunEnd::already_finished: return "already_finished";
  }
  return "";
}

// The defaults, then what the run was started with, then the file, then the command line.
TrainSettings read_all(const Options& options) {
  TrainSettings settings;
  if (!options.file.empty()) read_settings(options.file, settings);
  options.settings.apply(settings);
  if (!options.resume) return settings;
  if (settings.out.empty()) throw UsageError("--resume needs --out, the directory of the run to go on with");
  const std::string out = settings.out;
  const auto before = settings_of_run(out);
  if (!before) return settings;
  settings = *before;
  settings.out = out;
  if (!options.file.empty()) read_settings(options.file, settings);
  options.settings.apply(settings);
  return settings;
}

void print_line(const std::string& line) {
  print(line);
  flush();
}

void run(const Options& options) {
  const TrainSettings settings = read_all(options);
  std::optional<TrainProgress> progress;
  if (!options.common.quiet && !options.json) progress.emplace();

  ContextOptions context = context_options(options.common);
  context.log = [log = context.log, &progress](LogLevel level, std::string_view text) {
    if (progress) progress->clear();
    log(level, text);
  };
  Context ctx(context);
  TrainOptions train_options{.resume = options.resume, .stop = interrupted};
  train_options.open_model = [&](const std::string& name) {
    CommonOptions named = options.common;
    named.model = name;
    return open_checkpoint(named);
  };
  if (options.json) {
    train_options.on_log = [](const StepReport& r) { print_line(json_line(r)); };
    train_options.on_evaluation = [](const EvaluationReport& r) { print_line(json_line(r)); };
    train_options.on_sample = [](const SampleReport& r) { print_line(json_line(r)); };
  }
  if (progress) {
    train_options.on_start = [&](const RunStart& s) { progress->start(s); };
    train_options.on_step = [&](const StepReport& r) { progress->step(r); };
    train_options.on_evaluation = [&](const EvaluationReport& r) { progress->evaluation(r); };
    train_options.on_sample = [&](const SampleReport& r) { progress->sample(r); };
    train_options.on_checkpoint = [&](const std::filesystem::path& path) { progress->checkpoint(path); };
  }
  const TrainResult result = train(ctx, settings, train_options);
  if (progress) progress->end(result, settings.out);
  report_profile(ctx);
  if (!options.json) return;
  JsonObject object;
  object.add("end", name_of(result.end)).add("steps", result.steps).add("seconds", result.seconds);
  if (result.best_step >= 0) object.add("best_step", result.best_step).add("best_loss", result.best_loss);
  print(object.line());
}

}  // namespace

void add_train(const Command& program) {
  const Command command = program.add_command(
      "train", "Train a model on text or token ids: from fresh weights, or a checkpoint on");
  auto options = std::make_shared<Options>(command);
  command
      .text("--settings", options->file, "FILE",
            "Read any of the options above from a JSON or TOML file; the command line goes before it")
      .not_empty();
  command.flag("--resume", options->resume,
               "Go on from the newest checkpoint in --out; begin where there is none");
  command.flag("--json", options->json, "Print a JSON object for each step, evaluation and sample");
  add_machine(command, options->common);
  add_messages(command, options->common);
  command.epilogue(
      "The run leaves a model in --out: model.safetensors, config.json and tokenizer.json, beside\n"
      "settings.json, metrics.jsonl, samples.jsonl and checkpoints/step-N. Ctrl-C saves a checkpoint and "
      "ends.");
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
