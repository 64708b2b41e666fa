#include <algorithm>

#include "eval/metrics.h"
#include "krait/core/error.h"
#include "krait/eval/tasks.h"

namespace krait {
namespace {

// The requests of a task as ids, those of each document together.
struct Encoded {
  std::vector<Continuation> continuations;
  std::vector<std::size_t> ends;  // of each document's among them
};

void encode(const Task& task, const TaskDocument& document, PairEncoder& encoder,
            const EvaluateOptions& options, std::vector<Continuation>& out) {
  if (task.kind == TaskKind::loglikelihood_rolling) {
    auto windows =
        rolling_windows(encoder.encode_text(document.text), options.prefix_token, options.max_length);
    out.insert(out.end(), std::make_move_iterator(windows.begin()), std::make_move_iterator(windows.end()));
    return;
  }
  for (const TaskRequest& request : document.requests)
    out.push_back(encoder.encode(request.context, request.continuation));
  if (std::ranges::find(task.metrics, "acc_mutual_info") == task.metrics.end()) return;
  for (const std::string& choice : document.choices)
    out.push_back(encoder.encode("", task.target_delimiter + choice));
}

Encoded encode(const Task& task, const Tokenizer& tokenizer, const EvaluateOptions& options) {
  PairEncoder encoder(tokenizer, options.prefix_token);
  Encoded encoded;
  for (std::size_t i = 0; i < task.documents.size(); ++i) {
    const std::size_t first = encoded.continuations.size();
    try {
      encode(task, task.documents[i], encoder, options, encoded.continuations);
      for (std::size_t at = first; at < encoded.continuations.size(); ++at)
        require(std::ssize(encoded.continuations[at].continuation) <= options.max_length,
                "a continuation has ", encoded.continuations[at].continuation.size(),
                " tokens, expected at most max_length = ", options.max_length);
    } catch (const Error& error) {
      fail(error.kind(), "task ", task.name, ", document ", i, ": ", error.what());
    }
    encoded.ends.push_back(encoded.continuations.size());
  }
  return encoded;
}

TaskResult evaluate(Context& ctx, const LanguageModel& model, const Tokenizer& tokenizer, const Task& task,
                    const EvaluateOptions& options) {
  require(!task.documents.empty(), "task ", task.name, " has no documents");
  const Encoded encoded = encode(task, tokenizer, options);
  LikelihoodOptions likelihood_options{.max_length = options.max_length, .batch_size = options.batch_size};
  if (options.progress)
    likelihood_options.progress = [&](std::int64_t done, std::int64_t total) {
      options.progress(task, done, total);
    };
  const std::vector<Likelihood> found = likelihoods(ctx, model, encoded.continuations, likelihood_options);
  TaskResult result{.name = task.name, .metrics = {}, .documents = {}};
  std::size_t begin = 0;
  for (std::size_t i = 0; i < task.documents.size(); ++i) {
    const std::size_t end = encoded.ends[i];
    DocumentResult document{.requests = {found.begin() + static_cast<std::ptrdiff_t>(begin),
                                         found.begin() + static_cast<std::ptrdiff_t>(end)},
                            .metrics = {}};
    if (task.kind == TaskKind::loglikelihood_rolling) {
      double sum = 0.0;
      for (const Likelihood& window : document.requests) sum += window.log_likelihood;
      document.requests = {{.log_likelihood = sum, .is_greedy = false}};
    }
    document.metrics = document_metrics(task, task.documents[i], document.requests);
    result.documents.push_back(std::move(document));
    begin = end;
  }
  result.metrics = aggregate(ctx, task, result.documents, options.bootstrap_iterations);
  return result;
}

}  // namespace

std::vector<TaskResult> evaluate(Context& ctx, const LanguageModel& model, const Tokenizer& tokenizer,
                                 std::span<const Task> tasks, const EvaluateOptions& options) {
  require(options.max_length >= 1, "max_length is ", options.max_length, ", expected at least 1");
  std::vector<TaskResult> results;
  for (const Task& task : tasks) results.push_back(evaluate(ctx, model, tokenizer, task, options));
  return results;
}

}  // namespace krait
