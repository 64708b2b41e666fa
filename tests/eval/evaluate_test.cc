#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "io/scratch.h"
#include "krait/eval/tasks.h"
#include "krait/models/load.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden;
using Json = nlohmann::json;

// What lm-evaluation-harness measured with transformers, document by document.
TEST(Evaluate, AgreesWithTheHarness) {
  const Tokenizer tokenizer = Tokenizer::from_file(golden("eval") / "tokenizer.json");
  const std::vector<Task> tasks = read_tasks({golden("eval") / "tasks"});
  Context ctx;
  for (const Json& run : Json::parse(io::content_of(golden("eval") / "results.json"))) {
    const LanguageModel model = load_language_model(ctx, open_model_directory(golden(run["model"])));
    const auto results =
        evaluate(ctx, model, tokenizer, tasks, {.prefix_token = 0, .max_length = run["max_length"]});
    ASSERT_EQ(results.size(), run["tasks"].size());
    for (const TaskResult& result : results) {
      SCOPED_TRACE(concat(run["model"], " ", run["max_length"], " ", result.name));
      const Json& wanted = run["tasks"][result.name];
      std::size_t compared = 0;
      for (const MetricResult& metric : result.metrics) {
        const double value = wanted["metrics"][metric.name];
        EXPECT_NEAR(metric.value, value, 1e-5 * std::max(1.0, value)) << metric.name;
        ++compared;
        const std::string error = metric.name + "_stderr";
        ASSERT_EQ(metric.standard_error.has_value(), wanted["metrics"].contains(error)) << error;
        if (!metric.standard_error) continue;
        const double deviation = wanted["metrics"][error];
        EXPECT_NEAR(*metric.standard_error, deviation, 1e-5 * std::max(1.0, deviation)) << error;
        ++compared;
      }
      EXPECT_EQ(compared, wanted["metrics"].size());
      ASSERT_EQ(result.documents.size(), wanted["documents"].size());
      for (std::size_t i = 0; i < result.documents.size(); ++i) {
        const Json& document = wanted["documents"][i];
        const auto& requests = result.documents[i].requests;
        ASSERT_EQ(requests.size(), document["log_likelihoods"].size());
        for (std::size_t r = 0; r < requests.size(); ++r) {
          EXPECT_NEAR(requests[r].log_likelihood, document["log_likelihoods"][r].get<double>(), 1e-4);
          EXPECT_EQ(requests[r].is_greedy, document["is_greedy"][r].get<bool>());
        }
      }
    }
  }
}

class EvaluateTest : public ::testing::Test {
 protected:
  EvaluateTest()
      : model_(load_language_model(ctx_, open_model_directory(golden("hf-mamba-tiny")))),
        tokenizer_(Tokenizer::from_file(golden("eval") / "tokenizer.json")) {}

  TaskResult run(const Task& task, const EvaluateOptions& options = {}) {
    return evaluate(ctx_, model_, tokenizer_, std::span(&task, 1), options)[0];
  }
  Task task(std::string_view documents, std::string_view description) {
    scratch_.put("docs.jsonl", documents);
    return read_task(scratch_.put("t.json", description));
  }

  Context ctx_;
  LanguageModel model_;
  Tokenizer tokenizer_;
  io::Scratch scratch_;
};

TEST_F(EvaluateTest, AccuraciesNormaliseByCharactersAndByBytes) {
  const Task t = task(R"({"context": "c", "choices": ["aaaa", "\u00e9\u00e9\u00e9", "b"], "gold": 0})",
                      R"({"output_type": "multiple_choice", "documents": "docs.jsonl",
                          "metric_list": ["acc", "acc_norm", "acc_bytes", "acc_mutual_info"]})");
  const DocumentResult document = run(t).documents[0];
  ASSERT_EQ(document.requests.size(), 6U);
  const auto best = [](std::vector<double> scores) {
    return std::ranges::max_element(scores) - scores.begin() == 0 ? 1.0 : 0.0;
  };
  std::vector<double> ll;
  for (const Likelihood& request : document.requests) ll.push_back(request.log_likelihood);
  EXPECT_EQ(document.metrics,
            (std::vector<double>{best({ll[0], ll[1], ll[2]}), best({ll[0] / 4, ll[1] / 3, ll[2] / 1}),
                                 best({ll[0] / 4, ll[1] / 6, ll[2] / 1}),
                                 best({ll[0] - ll[3], ll[1] - ll[4], ll[2] - ll[5]})}));
}

TEST_F(EvaluateTest, OneDocumentHasNoStandardError) {
  Task t = read_task(golden("eval") / "tasks/last_word.json", 1);
  for (const MetricResult& metric : run(t).metrics) EXPECT_FALSE(metric.standard_error) << metric.name;
  t = read_task(golden("eval") / "tasks/last_word.json");
  for (const MetricResult& metric : run(t, {.bootstrap_iterations = 0}).metrics)
    EXPECT_FALSE(metric.standard_error) << metric.name;
  for (const MetricResult& metric : run(t, {.bootstrap_iterations = 10}).metrics)
    EXPECT_TRUE(metric.standard_error) << metric.name;
}

TEST_F(EvaluateTest, EmptyTexts) {
  const std::string description = R"({"output_type": "loglikelihood_rolling", "documents": "docs.jsonl"})";
  const TaskResult some = run(task("{\"text\": \"\"}\n{\"text\": \"the king\"}\n", description));
  EXPECT_EQ(some.documents[0].requests[0].log_likelihood, 0.0);
  EXPECT_NEAR(some.metrics[0].value, std::exp(-some.documents[1].requests[0].log_likelihood / 3), 1e-9);
  EXPECT_NEAR(some.metrics[1].value, std::exp(-some.documents[1].requests[0].log_likelihood / 8), 1e-9);
  EXPECT_MESSAGE(run(task("{\"text\": \"\"}", description)), "task t: all documents are empty");
}

TEST_F(EvaluateTest, NamesTaskAndDocument) {
  const Task long_one = task(
      "{\"context\": \"a\", \"continuation\": \" b\"}\n{\"context\": \"a\", \"continuation\": \" long "
      "word\"}",
      R"({"task": "words", "output_type": "loglikelihood", "documents": "docs.jsonl"})");
  EXPECT_MESSAGE(run(long_one, {.max_length = 3}), "task words, document 1: a continuation has ");
  EXPECT_MESSAGE(run(long_one, {.max_length = 0}), "max_length is 0");
  const Task empty =
      task(R"({"context": "a", "continuation": ""})",
           R"({"task": "nothing", "output_type": "loglikelihood", "documents": "docs.jsonl"})");
  EXPECT_MESSAGE(run(empty), "task nothing, document 0: a continuation has no tokens of its own");
  EXPECT_MESSAGE(run({.name = "none"}), "task none has no documents");
}

}  // namespace
}  // namespace krait
