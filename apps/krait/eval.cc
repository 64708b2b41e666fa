// krait eval: how a model does on tasks.
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iomanip>
#include <memory>
#include <optional>
#include <sstream>

#include "commands.h"
#include "input.h"
#include "json_object.h"
#include "krait/core/error.h"
#include "krait/eval/tasks.h"
#include "krait/io/atomic_file.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  std::vector<std::string> tasks;
  std::int64_t limit = 0;
  std::int64_t max_length = 0;
  std::int64_t prefix_token = -1;
  EvaluateOptions evaluate;
  std::string output;
  std::string samples;
  bool json = false;
};

std::vector<TaskResult> run_tasks(Options& options) {
  const std::vector<std::filesystem::path> paths(options.tasks.begin(), options.tasks.end());
  const std::vector<Task> tasks = read_tasks(paths, options.limit);
  Context ctx(context_options(options.common));
  const ModelFiles files = open_checkpoint(options.common);
  const LanguageModel model = load_language_model(ctx, files, load_options(options.common));
  const Tokenizer tokenizer = load_tokenizer(files);
  if (options.max_length == 0) options.max_length = max_length_of(files);
  if (options.prefix_token < 0) options.prefix_token = prefix_token_of(files, tokenizer);
  options.evaluate.max_length = options.max_length;
  options.evaluate.prefix_token = options.prefix_token;
  std::vector<TaskResult> results;
  for (const Task& task : tasks) {
    options.evaluate.progress = [bar = progress_of(task.name, options.common)](const Task&, std::int64_t done,
                                                                               std::int64_t total) {
      if (bar) bar(static_cast<std::uint64_t>(done), static_cast<std::uint64_t>(total));
    };
    for (TaskResult& result : evaluate(ctx, model, tokenizer, std::span(&task, 1), options.evaluate))
      results.push_back(std::move(result));
  }
  report_profile(ctx);
  return results;
}

// Names and layout as lm-evaluation-harness writes its results.
std::string to_json(const std::vector<TaskResult>& results, const Options& options, double seconds) {
  JsonObject by_task;
  JsonObject better;
  for (const TaskResult& result : results) {
    JsonObject values;
    JsonObject is_better;
    values.add("alias", result.name).add("sample_len", result.documents.size());
    for (const MetricResult& metric : result.metrics) {
      values.add(metric.name + ",none", metric.value);
      if (metric.standard_error)
        values.add(metric.name + "_stderr,none", *metric.standard_error);
      else
        values.add(metric.name + "_stderr,none", "N/A");
      is_better.add(metric.name, metric.higher_is_better);
    }
    by_task.add(result.name, values);
    better.add(result.name, is_better);
  }
  JsonObject config;
  config.add("model", "krait")
      .add("pretrained", options.common.model)
      .add("device", options.common.device)
      .add("dtype", options.common.dtype)
      .add("batch_size", options.evaluate.batch_size)
      .add("limit", options.limit)
      .add("max_length", options.max_length)
      .add("prefix_token", options.prefix_token)
      .add("bootstrap_iters", options.evaluate.bootstrap_iterations);
  return JsonObject()
      .add("results", by_task)
      .add("higher_is_better", better)
      .add("config", config)
      .add("krait_version", KRAIT_VERSION)
      .add("total_evaluation_time_seconds", seconds)
      .line();
}

// One line for each document.
std::string to_samples(const std::vector<TaskResult>& results) {
  std::string lines;
  for (const TaskResult& result : results) {
    for (std::size_t i = 0; i < result.documents.size(); ++i) {
      const DocumentResult& document = result.documents[i];
      std::vector<double> log_likelihoods;
      std::vector<bool> is_greedy;
      for (const Likelihood& request : document.requests) {
        log_likelihoods.push_back(request.log_likelihood);
        is_greedy.push_back(request.is_greedy);
      }
      JsonObject line;
      line.add("task", result.name)
          .add("doc_id", i)
          .add("log_likelihoods", log_likelihoods)
          .add("is_greedy", is_greedy);
      for (std::size_t m = 0; m < result.metrics.size(); ++m)
        line.add(result.metrics[m].name, document.metrics[m]);
      lines += line.line();
    }
  }
  return lines;
}

std::string to_table(const std::vector<TaskResult>& results) {
  std::vector<std::vector<std::string>> rows{{"task", "documents", "metric", "value", "std. error"}};
  const auto fixed = [](double value) {
    std::ostringstream text;
    text << std::fixed << std::setprecision(4) << value;
    return text.str();
  };
  for (const TaskResult& result : results)
    for (const MetricResult& metric : result.metrics)
      rows.push_back({result.name, std::to_string(result.documents.size()), metric.name, fixed(metric.value),
                      metric.standard_error ? fixed(*metric.standard_error) : ""});
  std::vector<std::size_t> widths(rows[0].size(), 0);
  for (const auto& row : rows)
    for (std::size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  std::string table;
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t c = 0; c < row.size(); ++c) {
      const std::string space(widths[c] - row[c].size(), ' ');
      const bool is_text = c == 0 || c == 2;  // else a number, to the right
      line += (c == 0 ? "" : "  ") + (is_text ? row[c] + space : space + row[c]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    table += line + "\n";
  }
  return table;
}

void run(Options& options) {
  // Files that cannot be written are found before the work, not behind it.
  std::optional<io::AtomicFile> output;
  std::optional<io::AtomicFile> samples;
  if (!options.output.empty()) output.emplace(options.output);
  if (!options.samples.empty()) samples.emplace(options.samples);
  const auto start = std::chrono::steady_clock::now();
  const std::vector<TaskResult> results = run_tasks(options);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const std::string json = to_json(results, options, seconds);
  const auto finish = [](io::AtomicFile& file, std::string_view text) {
    file.write(text);
    file.commit();
  };
  if (output) finish(*output, json);
  if (samples) finish(*samples, to_samples(results));
  print(options.json ? json : to_table(results));
}

}  // namespace

void add_eval(const Command& program) {
  auto options = std::make_shared<Options>();
  const Command command = program.add_command("eval", "Evaluate a model on tasks in local files");
  add_model(command, options->common);
  command
      .texts("--tasks", options->tasks, "FILE", /*greedy=*/true,
             "Descriptions of tasks (.json), directories of them, or documents alone (.jsonl)")
      .required()
      .not_empty();
  command.integer("--limit", options->limit, 1, kMaxCount, "The first N documents of each task alone");
  command.integer("--batch-size", options->evaluate.batch_size, 0, kMaxCount,
                  "Sequences that run together; 0 is chosen from the size of their states");
  command.integer(
      "--max-length", options->max_length, 1, kMaxCount,
      "Tokens that the model sees at a time; what its configuration says, else 2048, where left out");
  command.integer(
      "--prefix-token", options->prefix_token, 0, kMaxCount,
      "Id in place of an empty context; the token of the beginning or end of a text where left out");
  command.integer("--bootstrap-iterations", options->evaluate.bootstrap_iterations, 0, kMaxCount,
                  "Resamplings behind the standard error of a perplexity; 0 leaves out all standard errors");
  command.text("--output,-o", options->output, "FILE", "Write the results as JSON").not_empty();
  command.text("--samples", options->samples, "FILE", "Write the likelihoods of each document as JSON lines")
      .not_empty();
  command.flag("--json", options->json, "Print the results as JSON instead of a table");
  add_common(command, options->common);
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
