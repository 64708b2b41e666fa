// Evaluation (krait/eval/likelihood.h, krait/eval/tasks.h).
#include <tvm/ffi/container/tuple.h>

#include "ffi/contexts.h"
#include "ffi/model.h"
#include "krait/core/error.h"
#include "krait/eval/tasks.h"

namespace krait::ffi {
namespace {

using Callback = tvm::ffi::Optional<tvm::ffi::Function>;
using OptionalTokenizer = tvm::ffi::Optional<TokenizerRef>;

// Ends by signals, or where `interrupt`, if there is one, says so.
std::function<bool()> ended_by(const Callback& interrupt) {
  return interrupt.has_value() ? asked(interrupt) : by_signals();
}

TokenizerRef tokenizer_of(const ModelRef& model, const OptionalTokenizer& tokenizer) {
  return tokenizer.has_value() ? *tokenizer : model->tokenizer();
}

std::int64_t model_prefix_token(const ModelRef& model, const OptionalTokenizer& tokenizer) {
  return prefix_token_of(model->files(), tokenizer_of(model, tokenizer)->tokenizer);
}

std::int64_t model_max_length(const ModelRef& model) { return max_length_of(model->files()); }

// Rows of ids (2n), contexts and continuations in turn; log_likelihoods (n) f64 and is_greedy (n) bool are
// written, on the CPU.
void model_likelihoods(const ModelRef& model, Given ids, Given offsets, std::int64_t max_length,
                       std::int64_t batch_size, bool share_prefixes, const Callback& progress,
                       const Callback& interrupt, Given log_likelihoods, Given is_greedy) {
  Operands of("likelihoods");
  const auto rows = rows_of(of("ids", ids), of("offsets", offsets));
  require(rows.size() % 2 == 0, "[likelihoods] ", rows.size(),
          " rows of ids, expected a context and a continuation in turn");
  std::vector<Continuation> continuations;
  for (std::size_t i = 0; i < rows.size(); i += 2)
    continuations.push_back({.context = {rows[i].begin(), rows[i].end()},
                             .continuation = {rows[i + 1].begin(), rows[i + 1].end()}});
  const Tensor sums = of("log_likelihoods", log_likelihoods);
  const Tensor greedy = of("is_greedy", is_greedy);
  const Dims expected{static_cast<std::int64_t>(continuations.size())};
  require(sums && sums.shape() == expected && sums.dtype() == DType::f64 && sums.device() == Device{},
          "[likelihoods] expected log_likelihoods of shape ", expected, " and dtype f64 on the CPU");
  require(greedy && greedy.shape() == expected && greedy.dtype() == DType::boolean &&
              greedy.device() == Device{} && greedy.is_contiguous(),
          "[likelihoods] expected is_greedy of shape ", expected, " and dtype bool on the CPU, contiguous");
  LikelihoodOptions options{
      .max_length = max_length, .batch_size = batch_size, .share_prefixes = share_prefixes};
  if (progress.has_value())
    options.progress = [&](std::int64_t done, std::int64_t total) { (*progress)(done, total); };
  const Exclusive use(model, ended_by(interrupt));
  const std::vector<Likelihood> found = likelihoods(use.context(), model->model(), continuations, options);
  std::vector<double> values;
  for (std::size_t i = 0; i < found.size(); ++i) {
    values.push_back(found[i].log_likelihood);
    static_cast<bool*>(greedy.raw())[i] = found[i].is_greedy;
  }
  sums.copy_from(Tensor::from(values));
}

// Name, value, standard error, whether higher is better.
using MetricTuple = tvm::ffi::Tuple<Word, double, tvm::ffi::Optional<double>, bool>;
// Log-likelihoods of its requests, whether each is greedy, and its value of each metric.
using DocumentTuple =
    tvm::ffi::Tuple<tvm::ffi::Array<double>, tvm::ffi::Array<bool>, tvm::ffi::Array<double>>;
using TaskTuple = tvm::ffi::Tuple<Word, tvm::ffi::Array<MetricTuple>, tvm::ffi::Array<DocumentTuple>>;

TaskTuple tuple_of(const TaskResult& result) {
  tvm::ffi::Array<MetricTuple> metrics;
  for (const MetricResult& metric : result.metrics) {
    tvm::ffi::Optional<double> error;
    if (metric.standard_error) error = *metric.standard_error;
    metrics.push_back(MetricTuple(metric.name, metric.value, error, metric.higher_is_better));
  }
  tvm::ffi::Array<DocumentTuple> documents;
  for (const DocumentResult& document : result.documents) {
    tvm::ffi::Array<double> log_likelihoods;
    tvm::ffi::Array<bool> is_greedy;
    for (const Likelihood& request : document.requests) {
      log_likelihoods.push_back(request.log_likelihood);
      is_greedy.push_back(request.is_greedy);
    }
    documents.push_back(
        DocumentTuple(log_likelihoods, is_greedy,
                      tvm::ffi::Array<double>(document.metrics.begin(), document.metrics.end())));
  }
  return TaskTuple(result.name, metrics, documents);
}

// max_length 0 and prefix_token -1: what the checkpoint says. `progress` is told the name of a task, and how
// many of its requests are done.
tvm::ffi::Array<TaskTuple> model_evaluate(const ModelRef& model, const OptionalTokenizer& tokenizer,
                                          const Words& paths, std::int64_t limit, std::int64_t max_length,
                                          std::int64_t prefix_token, std::int64_t batch_size,
                                          std::int64_t bootstrap_iterations, const Callback& progress,
                                          const Callback& interrupt) {
  const std::vector<std::string> names = texts_of(paths);
  const std::vector<Task> tasks = read_tasks({names.begin(), names.end()}, limit);
  const TokenizerRef words = tokenizer_of(model, tokenizer);
  EvaluateOptions options{
      .prefix_token = prefix_token < 0 ? prefix_token_of(model->files(), words->tokenizer) : prefix_token,
      .max_length = max_length == 0 ? max_length_of(model->files()) : max_length,
      .batch_size = batch_size,
      .bootstrap_iterations = bootstrap_iterations};
  if (progress.has_value())
    options.progress = [&](const Task& task, std::int64_t done, std::int64_t total) {
      (*progress)(task.name, done, total);
    };
  const Exclusive use(model, ended_by(interrupt));
  tvm::ffi::Array<TaskTuple> results;
  for (const TaskResult& result : evaluate(use.context(), model->model(), words->tokenizer, tasks, options))
    results.push_back(tuple_of(result));
  return results;
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(model_prefix_token, krait::ffi::model_prefix_token)
KRAIT_FFI(model_max_length, krait::ffi::model_max_length)
KRAIT_FFI(model_likelihoods, krait::ffi::model_likelihoods)
KRAIT_FFI(model_evaluate, krait::ffi::model_evaluate)
