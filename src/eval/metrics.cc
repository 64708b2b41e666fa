#include "eval/metrics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numbers>

#include "eval/python_text.h"
#include "eval/statistics.h"
#include "krait/core/error.h"

namespace krait {
namespace {

constexpr std::array kMetrics = {
    Metric{TaskKind::multiple_choice, "acc", "mean", true},
    Metric{TaskKind::multiple_choice, "acc_norm", "mean", true},
    Metric{TaskKind::multiple_choice, "acc_bytes", "mean", true},
    Metric{TaskKind::multiple_choice, "acc_mutual_info", "mean", true},
    Metric{TaskKind::loglikelihood, "perplexity", "perplexity", false},
    Metric{TaskKind::loglikelihood, "acc", "mean", true},
    Metric{TaskKind::loglikelihood_rolling, "word_perplexity", "weighted_perplexity", false},
    Metric{TaskKind::loglikelihood_rolling, "byte_perplexity", "weighted_perplexity", false},
    Metric{TaskKind::loglikelihood_rolling, "bits_per_byte", "bits_per_byte", false},
};

// Whether the choice of the largest score, the first of equal ones, is right.
double is_right(const TaskDocument& document, const std::function<double(std::size_t)>& score) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < document.choices.size(); ++i)
    if (score(i) > score(best)) best = i;
  return std::ranges::find(document.gold, static_cast<std::int64_t>(best)) != document.gold.end() ? 1.0 : 0.0;
}

double choice_metric(std::string_view name, const TaskDocument& document,
                     std::span<const Likelihood> requests) {
  const auto& choices = document.choices;
  if (name == "acc_norm")
    return is_right(document, [&](std::size_t i) {
      return requests[i].log_likelihood / static_cast<double>(count_characters(choices[i]));
    });
  if (name == "acc_bytes")
    return is_right(document, [&](std::size_t i) {
      return requests[i].log_likelihood / static_cast<double>(choices[i].size());
    });
  if (name == "acc_mutual_info")
    return is_right(document, [&](std::size_t i) {
      return requests[i].log_likelihood - requests[choices.size() + i].log_likelihood;
    });
  return is_right(document, [&](std::size_t i) { return requests[i].log_likelihood; });
}

}  // namespace

const Metric* find_metric(TaskKind kind, std::string_view name) {
  const auto* found =
      std::ranges::find_if(kMetrics, [&](const Metric& m) { return m.kind == kind && m.name == name; });
  return found == kMetrics.end() ? nullptr : found;
}

std::string metric_names(TaskKind kind) {
  std::string names;
  for (const Metric& metric : kMetrics)
    if (metric.kind == kind) names.append(names.empty() ? "" : ", ").append(metric.name);
  return names;
}

std::vector<std::string> default_metrics(TaskKind kind) {
  switch (kind) {
    case TaskKind::multiple_choice: return {"acc", "acc_norm"};
    case TaskKind::loglikelihood: return {"perplexity", "acc"};
    case TaskKind::loglikelihood_rolling: return {"word_perplexity", "byte_perplexity", "bits_per_byte"};
  }
  return {};
}

std::vector<double> document_metrics(const Task& task, const TaskDocument& document,
                                     std::span<const Likelihood> requests) {
  std::vector<double> values;
  for (const std::string& name : task.metrics) {
    if (task.kind == TaskKind::multiple_choice)
      values.push_back(choice_metric(name, document, requests));
    else if (name == "acc")
      values.push_back(requests[0].is_greedy ? 1.0 : 0.0);
    else
      values.push_back(requests[0].log_likelihood);
  }
  return values;
}

std::vector<MetricResult> aggregate(const Context& ctx, const Task& task,
                                    std::span<const DocumentResult> documents,
                                    std::int64_t bootstrap_iterations) {
  std::vector<MetricResult> results;
  for (std::size_t m = 0; m < task.metrics.size(); ++m) {
    const Metric* metric = find_metric(task.kind, task.metrics[m]);
    require(metric != nullptr, "task ", task.name, ": metric '", task.metrics[m], "' is not known for ",
            name_of(task.kind), ", expected ", metric_names(task.kind));
    std::vector<double> values;
    for (const DocumentResult& document : documents) values.push_back(document.metrics[m]);
    MetricResult result{.name = metric->name,
                        .value = 0.0,
                        .standard_error = std::nullopt,
                        .higher_is_better = metric->higher_is_better};
    const std::string_view aggregation = metric->aggregation;
    const bool with_error = bootstrap_iterations > 0 && values.size() > 1;
    if (aggregation == "mean") {
      result.value = mean(values);
      if (with_error) result.standard_error = standard_error_of_mean(values);
    } else if (aggregation == "perplexity") {
      result.value = std::exp(-mean(values));
      if (with_error)
        result.standard_error = bootstrap_error_of_perplexity(ctx, values, bootstrap_iterations);
    } else {
      std::int64_t units = 0;
      double sum = 0.0;
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::string& text = task.documents[i].text;
        units += result.name == "word_perplexity" ? count_words(text) : std::ssize(text);
        sum += values[i];
      }
      require(units > 0, "task ", task.name, ": all documents are empty");
      const double loss = -sum / static_cast<double>(units);
      result.value = aggregation == "bits_per_byte" ? loss / std::numbers::ln2 : std::exp(loss);
    }
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace krait
