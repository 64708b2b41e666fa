// Training runs (krait/train/*.h).
#include "krait/train/train.h"

#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/function.h>

#include "ffi/contexts.h"
#include "ffi/model.h"
#include "krait/core/error.h"
#include "krait/train/token_file.h"

namespace krait::ffi {
namespace {

using Callback = tvm::ffi::Optional<tvm::ffi::Function>;

std::string_view name_of(RunEnd end) {
  switch (end) {
    case RunEnd::finished: return "finished";
    case RunEnd::stopped_early: return "stopped_early";
    case RunEnd::interrupted: return "interrupted";
    case RunEnd::already_finished: return "already_finished";
  }
  return "";
}

tvm::ffi::Optional<double> optional_of(const std::optional<double>& value) {
  return value ? tvm::ffi::Optional<double>(*value) : tvm::ffi::Optional<double>();
}

void report_step(const tvm::ffi::Function& callback, const StepReport& r) {
  callback(r.step, r.loss, r.grad_norm, r.lr, r.tokens, r.seconds, r.tokens_per_second, r.skipped,
           r.was_skipped);
}

// The settings of a run: the defaults or, where it goes on, those that it was started with; then the file;
// then the members of `given`, a JSON object, that `names` names.
TrainSettings settings_of(const Word& given, const Words& names, const OptionalWord& file, bool resume) {
  TrainSettings line;
  parse_settings_json(text_of(given), "train", line);
  const auto apply = [&](TrainSettings& settings) {
    if (file.has_value()) read_settings(text_of(*file), settings);
    override_settings(settings, line, texts_of(names));
  };
  TrainSettings settings;
  apply(settings);
  if (!resume) return settings;
  require(!settings.out.empty(), "resume needs out, the directory of the run to go on with");
  auto before = settings_of_run(settings.out);
  if (!before) return settings;
  before->out = settings.out;
  apply(*before);
  return *before;
}

// How it ended, steps, step and loss of the best evaluation (-1 where there was none), seconds.
using ResultTuple = tvm::ffi::Tuple<Word, std::int64_t, std::int64_t, double, double>;

// `on_message` is told the level and text of warnings and notes; `stop` is asked between steps, and
// `interrupt` also within long work. All are called on the calling thread.
ResultTuple run_train(const Word& given, const Words& names, const OptionalWord& file, bool resume,
                      const Word& device, std::int64_t threads, const OptionalWord& cache_dir,
                      tvm::ffi::Optional<bool> offline, bool progress, const Callback& on_start,
                      const Callback& on_step, const Callback& on_log, const Callback& on_evaluation,
                      const Callback& on_sample, const Callback& on_checkpoint, const Callback& on_message,
                      const Callback& stop, const Callback& interrupt) {
  const TrainSettings settings = settings_of(given, names, file, resume);
  const std::function<bool()> interrupted = asked(interrupt);
  const auto log = [&](LogLevel level, std::string_view text) {
    if (on_message.has_value())
      (*on_message)(level == LogLevel::warning ? "warning"
                    : level == LogLevel::info  ? "info"
                                               : "debug",
                    std::string(text));
  };
  Context ctx({.device = parse_device(text_of(device)),
               .threads = threads_of(threads),
               .log = log,
               .cancelled = interrupted});

  TrainOptions options{.resume = resume};
  options.stop = [&] { return interrupted() || (stop.has_value() && (*stop)().cast<bool>()); };
  options.open_model = [&](const std::string& name) {
    return open_source(name, {.cache_dir = cache_dir,
                              .offline = offline.has_value() ? std::optional<bool>(*offline) : std::nullopt,
                              .progress = progress,
                              .cancelled = interrupted,
                              .log = log});
  };
  if (on_start.has_value())
    options.on_start = [&](const RunStart& s) {
      (*on_start)(s.steps, s.first_step, s.parameters, s.data_tokens, s.batches_per_epoch);
    };
  if (on_step.has_value()) options.on_step = [&](const StepReport& r) { report_step(*on_step, r); };
  if (on_log.has_value()) options.on_log = [&](const StepReport& r) { report_step(*on_log, r); };
  if (on_evaluation.has_value())
    options.on_evaluation = [&](const EvaluationReport& r) {
      (*on_evaluation)(r.step, r.loss, optional_of(r.bits_per_byte), optional_of(r.average_loss),
                       optional_of(r.average_bits_per_byte), r.best, r.seconds);
    };
  if (on_sample.has_value()) options.on_sample = [&](const SampleReport& r) { (*on_sample)(r.step, r.text); };
  if (on_checkpoint.has_value())
    options.on_checkpoint = [&](const std::filesystem::path& path) { (*on_checkpoint)(path.string()); };

  const TrainResult result = train(ctx, settings, options);
  return ResultTuple(std::string(name_of(result.end)), result.steps, result.best_step, result.best_loss,
                     result.seconds);
}

// Name, type, description, choices (of words) and default as JSON of each setting.
tvm::ffi::Array<tvm::ffi::Tuple<Word, Word, Word, Words, Word>> train_settings_table() {
  TrainSettings settings;
  tvm::ffi::Array<tvm::ffi::Tuple<Word, Word, Word, Words, Word>> rows;
  for (const Setting& setting : settings_table(settings)) {
    Words choices;
    if (const auto* choice = std::get_if<Setting::Choice>(&setting.place))
      for (const std::string& name : choice->names) choices.push_back(name);
    rows.push_back(tvm::ffi::Tuple<Word, Word, Word, Words, Word>(
        setting.name, setting.type, setting.description, choices, value_text(setting)));
  }
  return rows;
}

// As JSON; None where there is no run.
OptionalWord train_settings_of_run(const Word& directory) {
  const auto settings = settings_of_run(text_of(directory));
  return settings ? OptionalWord(Word(settings_json(*settings))) : OptionalWord();
}

// Tokens, documents, bytes of text.
using PackTuple = tvm::ffi::Tuple<std::int64_t, std::int64_t, std::int64_t>;
PackTuple pack_tokens(const Words& texts, const TokenizerRef& tokenizer, const Word& out,
                      std::int64_t end_of_text, std::int64_t threads, const Callback& progress,
                      const Callback& interrupt) {
  std::vector<std::filesystem::path> paths;
  for (const Word& text : texts) paths.emplace_back(text_of(text));
  Context ctx({.threads = threads_of(threads), .cancelled = asked(interrupt)});
  PackOptions options;
  if (end_of_text >= 0) options.end_of_text = end_of_text;
  if (progress.has_value())
    options.progress = [&](std::uint64_t done, std::uint64_t total) {
      (*progress)(static_cast<std::int64_t>(done), static_cast<std::int64_t>(total));
    };
  const PackResult packed = pack_token_file(ctx, paths, tokenizer->tokenizer, text_of(out), options);
  return PackTuple(packed.tokens, packed.documents, static_cast<std::int64_t>(packed.bytes));
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(train, krait::ffi::run_train)
KRAIT_FFI(train_settings_table, krait::ffi::train_settings_table)
KRAIT_FFI(train_settings_of_run, krait::ffi::train_settings_of_run)
KRAIT_FFI(pack_tokens, krait::ffi::pack_tokens)
