// The metrics that tasks may ask for.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "krait/eval/tasks.h"

namespace krait {

struct Metric {
  TaskKind kind;
  const char* name;
  const char* aggregation;  // as the harness calls how documents become one number
  bool higher_is_better;
};

// Null where there is none of that name for the kind of task.
[[nodiscard]] const Metric* find_metric(TaskKind kind, std::string_view name);
// Their names, one after the other, for messages.
[[nodiscard]] std::string metric_names(TaskKind kind);
// Of a task that names none.
[[nodiscard]] std::vector<std::string> default_metrics(TaskKind kind);

// One value for each metric of `task`: of acc... 1 where the document is right, else 0; of perplexities its
// log-likelihood. `requests` has the likelihoods of the document's requests and, behind them, those of the
// choices without context where the task has the metric acc_mutual_info.
[[nodiscard]] std::vector<double> document_metrics(const Task& task, const TaskDocument& document,
                                                   std::span<const Likelihood> requests);

[[nodiscard]] std::vector<MetricResult> aggregate(const Context& ctx, const Task& task,
                                                  std::span<const DocumentResult> documents,
                                                  std::int64_t bootstrap_iterations);

}  // namespace krait
