// Tasks: what a model is evaluated on, read from local files in the conventions of lm-evaluation-harness.
// docs/evaluation.md describes the files.
//
//   const auto tasks = read_tasks({"tasks/"});
//   for (const TaskResult& result : evaluate(ctx, model, tokenizer, tasks, {.prefix_token = 0}))
//     for (const MetricResult& metric : result.metrics) std::cout << metric.name << " " << metric.value;
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "krait/eval/likelihood.h"

namespace krait {

enum class TaskKind : std::uint8_t {
  multiple_choice,        // which of several continuations is the most probable
  loglikelihood,          // one continuation, such as the last word of a text
  loglikelihood_rolling,  // whole texts
};
[[nodiscard]] std::string_view name_of(TaskKind kind);

struct TaskRequest {
  std::string context;
  std::string continuation;
};

struct TaskDocument {
  std::vector<TaskRequest> requests;  // multiple_choice: one a choice; loglikelihood: one
  std::vector<std::string>
      choices;  // multiple_choice: the texts whose lengths acc_norm and acc_bytes divide by
  std::vector<std::int64_t> gold;  // multiple_choice: the right ones; none where the document names no choice
  std::string text;                // loglikelihood_rolling
};

struct Task {
  std::string name;
  TaskKind kind = TaskKind::multiple_choice;
  // acc, acc_norm, acc_bytes and acc_mutual_info; perplexity and acc; word_perplexity, byte_perplexity and
  // bits_per_byte.
  std::vector<std::string> metrics;
  std::string target_delimiter = " ";  // multiple_choice: in front of the choices, in requests already
  std::vector<TaskDocument> documents;
};

// A task of a description (.json) or of documents alone (.jsonl); `limit` > 0: its first documents. Throws
// where it is not understood, naming file, line and field.
Task read_task(const std::filesystem::path& path, std::int64_t limit = 0);
// Several; a directory stands for the descriptions in it, by name. Throws where two have one name.
std::vector<Task> read_tasks(const std::vector<std::filesystem::path>& paths, std::int64_t limit = 0);

struct EvaluateOptions {
  std::int64_t prefix_token = 0;   // in place of an empty context: prefix_token_of()
  std::int64_t max_length = 2048;  // max_length_of()
  std::int64_t batch_size = 0;     // of LikelihoodOptions
  // Resamplings behind the standard error of a perplexity; 0: no standard errors at all.
  std::int64_t bootstrap_iterations = 100000;
  std::function<void(const Task& task, std::int64_t done, std::int64_t total)> progress;  // of requests
};

struct MetricResult {
  std::string name;
  double value = 0.0;
  std::optional<double> standard_error;  // of acc... and perplexity, of more than one document
  bool higher_is_better = true;
};

struct DocumentResult {
  std::vector<Likelihood> requests;  // of a text: one, with is_greedy false
  std::vector<double> metrics;       // in the order of the task's; of a perplexity the log-likelihood
};

struct TaskResult {
  std::string name;
  std::vector<MetricResult> metrics;
  std::vector<DocumentResult> documents;
};

std::vector<TaskResult> evaluate(Context& ctx, const LanguageModel& model, const Tokenizer& tokenizer,
                                 std::span<const Task> tasks, const EvaluateOptions& options = {});

}  // namespace krait
