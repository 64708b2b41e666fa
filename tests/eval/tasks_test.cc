#include "krait/eval/tasks.h"

#include <gtest/gtest.h>

#include "io/scratch.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden;
using Golds = std::vector<std::int64_t>;

class TasksTest : public ::testing::Test {
 protected:
  // A task with this description, where "docs.jsonl" has these lines.
  Task read(std::string_view description, std::string_view documents, std::int64_t limit = 0) {
    scratch_.put("docs.jsonl", documents);
    return read_task(scratch_.put("task.json", description), limit);
  }
  io::Scratch scratch_;
};

constexpr std::string_view kChoice =
    R"({"context": "Is it?", "choices": ["yes", "no"], "gold": 1}
)";

TEST_F(TasksTest, DocumentsAloneSayWhatTheyAre) {
  const Task choice = read_task(scratch_.put("a.jsonl", kChoice));
  EXPECT_EQ(choice.name, "a");
  EXPECT_EQ(choice.kind, TaskKind::multiple_choice);
  EXPECT_EQ(choice.metrics, (std::vector<std::string>{"acc", "acc_norm"}));
  ASSERT_EQ(choice.documents.size(), 1U);
  ASSERT_EQ(choice.documents[0].requests.size(), 2U);
  EXPECT_EQ(choice.documents[0].requests[1].context, "Is it?");
  EXPECT_EQ(choice.documents[0].requests[1].continuation, " no");
  EXPECT_EQ(choice.documents[0].choices, (std::vector<std::string>{"yes", "no"}));
  EXPECT_EQ(choice.documents[0].gold, Golds{1});

  const Task last = read_task(scratch_.put("b.jsonl", R"({"context": "I am the", "continuation": " king"})"));
  EXPECT_EQ(last.kind, TaskKind::loglikelihood);
  EXPECT_EQ(last.metrics, (std::vector<std::string>{"perplexity", "acc"}));
  EXPECT_EQ(last.documents[0].requests[0].continuation, " king");

  const Task text = read_task(scratch_.put("c.jsonl", "\n{\"text\": \"a b\"}\r\n\n{\"text\": \"c\"}"));
  EXPECT_EQ(text.kind, TaskKind::loglikelihood_rolling);
  ASSERT_EQ(text.documents.size(), 2U);
  EXPECT_EQ(text.documents[1].text, "c");
}

TEST_F(TasksTest, DescriptionsOfTheHarness) {
  const Task choice = read_task(golden("eval") / "tasks/choice.json");
  EXPECT_EQ(choice.name, "tiny_choice");
  EXPECT_EQ(choice.metrics, (std::vector<std::string>{"acc", "acc_norm", "acc_bytes", "acc_mutual_info"}));
  EXPECT_EQ(choice.documents.size(), 8U);
  EXPECT_EQ(choice.documents[2].requests[0].context,
            "Answer the questions.\n\nQuestion: Is this a dagger?\nAnswer:");
  const Task which = read_task(golden("eval") / "tasks/which.json");
  EXPECT_EQ(which.documents[0].requests[0].context, "The king gave the sword to the knight because the king");
  EXPECT_EQ(which.documents[0].requests[1].continuation, " was brave.");
  EXPECT_EQ(which.documents[0].gold, Golds{1});
  const Task last = read_task(golden("eval") / "tasks/last_word.json", 2);
  ASSERT_EQ(last.documents.size(), 2U);
  EXPECT_EQ(last.documents[1].requests[0].context, "O Romeo, Romeo! wherefore art thou");
  EXPECT_EQ(last.documents[1].requests[0].continuation, " Romeo");
}

TEST_F(TasksTest, ChoicesAndGoldOfManyForms) {
  const auto gold = [&](const std::string& target, const std::string& value) {
    return read(R"({"output_type": "multiple_choice", "documents": "docs.jsonl", "doc_to_text": "Q",
                    "doc_to_choice": ["yes", "no", "it is"], "doc_to_target": )" +
                    target + "}",
                R"({"label": )" + value + "}")
        .documents[0]
        .gold;
  };
  EXPECT_EQ(gold(R"("label")", "2"), Golds{2});
  EXPECT_EQ(gold(R"("label")", "\"1\""), Golds{1});
  EXPECT_EQ(gold(R"("label")", "\"it is\""), Golds{2});
  EXPECT_EQ(gold(R"("label")", "[0, 2]"), (Golds{0, 2}));
  EXPECT_EQ(gold(R"("{{['A', 'B', 'C'].index(label)}}")", "\"B\""), Golds{1});
  EXPECT_EQ(gold("2", "0"), Golds{2});
  const Task task =
      read(R"({"output_type": "multiple_choice", "documents": "docs.jsonl", "target_delimiter": "",
                             "doc_to_choice": "{{[a, b]}}", "doc_to_text": "{{a}} or", "doc_to_target": 0,
                             "metric_list": ["acc"], "num_fewshot": 0, "metadata": {"version": 1}})",
           R"({"a": "x", "b": "y"})");
  EXPECT_EQ(task.name, "task");
  EXPECT_EQ(task.documents[0].requests[1].context, "x or");
  EXPECT_EQ(task.documents[0].requests[1].continuation, "y");
}

// A field's digits are a text; what a template makes of digits is a number.
TEST_F(TasksTest, DigitsOfFieldsAndOfTemplates) {
  const auto document = [&](const std::string& target, const std::string& context) {
    return read(R"({"output_type": "multiple_choice", "documents": "docs.jsonl",
                    "description": "About {{sum}}: ", "doc_to_text": ")" +
                    context + R"(", "doc_to_choice": "choices", "doc_to_target": ")" + target + "\"}",
                R"({"sum": "1", "choices": ["1", "2", "0"], "answer": "2"})")
        .documents[0];
  };
  EXPECT_EQ(document("answer", "sum").gold, Golds{1});
  EXPECT_EQ(document("{{answer}}", "sum").gold, Golds{2});
  EXPECT_EQ(document("answer", "sum").requests[0].context, "About 1: 1");
  EXPECT_EQ(document("answer", "sum").requests[2].continuation, " 0");
  // The choices are contexts.
  EXPECT_EQ(document("answer", "{{sum}}").gold, Golds{1});
  EXPECT_EQ(document("answer", "{{sum}}").requests[2].context, "About 1: 0");
  EXPECT_EQ(document("answer", "{{sum}}").requests[2].continuation, " 2");
}

TEST_F(TasksTest, DirectoriesAndNames) {
  scratch_.put("b.jsonl", kChoice);
  scratch_.put("2.json", R"({"task": "two", "output_type": "multiple_choice", "documents": "b.jsonl"})");
  scratch_.put("1.json", R"({"task": "one", "output_type": "multiple_choice", "documents": "b.jsonl"})");
  const auto tasks = read_tasks({scratch_.path(), scratch_ / "b.jsonl"});
  ASSERT_EQ(tasks.size(), 3U);
  EXPECT_EQ(tasks[0].name, "one");
  EXPECT_EQ(tasks[1].name, "two");
  EXPECT_EQ(tasks[2].name, "b");
  EXPECT_MESSAGE(read_tasks({scratch_.path(), scratch_ / "1.json"}), "the task is called 'one', as that of ");
  const io::Scratch empty;
  EXPECT_MESSAGE(read_tasks({empty.path()}), "holds no description of a task (.json)");
  EXPECT_MESSAGE(read_tasks({empty / "none.json"}), "none.json");
}

TEST_F(TasksTest, RefusesDescriptions) {
  for (
      const auto& [description, part] : std::vector<std::pair<std::string, const char*>>{
          {"[]", "task.json: is not a JSON object"},
          {"task: x", "task.json: not JSON: parse error"},
          {"{}", "'output_type' is missing"},
          {R"({"task": ""})", "'task' is \"\", expected a name of one line"},
          {R"({"task": "a\nb"})", "'task' is \"a\\nb\", expected a name of one line"},
          {R"({"output_type": "multiple_choice", "documents": "docs.jsonl", "doc_to_choice": {"A": "x"}})",
           "expected a list of at least one text"},
          {R"({"output_type": "generate_until"})",
           "'output_type' is 'generate_until', expected multiple_choice"},
          {R"({"output_type": 3})", "task.json: output_type is 3, expected a string"},
          {R"({"output_type": "loglikelihood", "process_docs": "x"})",
           "'process_docs' is not understood here"},
          {R"({"output_type": "loglikelihood"})", "names no file of documents"},
          {R"({"output_type": "loglikelihood", "dataset_path": "EleutherAI/lambada_openai"})",
           "'dataset_path' is 'EleutherAI/lambada_openai', expected \"json\""},
          {R"({"output_type": "loglikelihood", "dataset_kwargs": {"data_files": {"a": "b"}}, "test_split": "c"})",
           "no split of 'data_files' is named"},
          {R"({"output_type": "loglikelihood", "documents": "docs.jsonl", "num_fewshot": 5})",
           "'num_fewshot' is 5, expected 0"},
          {R"({"output_type": "loglikelihood", "documents": "docs.jsonl", "metric_list": ["acc_norm"]})",
           "metric \"acc_norm\" is not known for loglikelihood, expected perplexity, acc"},
          {R"({"output_type": "loglikelihood", "documents": "docs.jsonl",
                "metric_list": [{"metric": "acc", "aggregation": "median"}]})",
           "the aggregation of acc is \"median\", expected \"mean\""},
          {R"({"output_type": "loglikelihood", "documents": "docs.jsonl", "metric_list": ["acc", "acc"]})",
           "names acc twice"},
          {R"({"output_type": "loglikelihood", "documents": "nowhere.jsonl"})", "nowhere.jsonl"}})
    EXPECT_MESSAGE(read(description, kChoice), part) << description;
}

TEST_F(TasksTest, RefusesDocuments) {
  const std::string description = R"({"output_type": "multiple_choice", "documents": "docs.jsonl"})";
  for (const auto& [document, part] : std::vector<std::pair<std::string, const char*>>{
           {"", "docs.jsonl: holds no documents"},
           {std::string(kChoice) + "{", "docs.jsonl:2: not JSON: parse error"},
           {"\n3", "docs.jsonl:2: is not a JSON object"},
           {std::string(100'000, '['), "docs.jsonl:1: nested deeper than"},
           {R"({"context": "c", "gold": 0})", "docs.jsonl:1: has no field 'choices'"},
           {R"({"context": "c", "choices": "yes", "gold": 0})", "'choices' is \"yes\", expected a list"},
           {R"({"context": "c", "choices": ["yes", ""], "gold": 0})", "a choice is \"\", expected a text"},
           {R"({"context": "c", "choices": [], "gold": 0})",
            "'choices' is [], expected a list of at least one"},
           {R"({"context": null, "choices": ["a"], "gold": 0})", "'context' is null, expected a text"},
           {R"({"context": "c", "choices": ["a"], "gold": 1})", "'gold' is 1, expected 0 to 0"},
           {R"({"context": "c", "choices": ["a"], "gold": -1})", "'gold' is -1, expected 0 to 0"},
           {R"({"context": "c", "choices": ["a"], "gold": "b"})",
            "'gold' is \"b\", which is none of the choices"},
           {R"({"context": "c", "choices": ["a"], "gold": [0, "a"]})", "'gold' holds \"a\""},
           {R"({"context": "c", "choices": ["a"], "gold": null})", "'gold' is null, expected the place"}})
    EXPECT_MESSAGE(read(description, document), part) << document;
  EXPECT_MESSAGE(read_task(scratch_.put("x.jsonl", R"({"question": "a"})")),
                 "none of the fields choices, continuation and text");
  EXPECT_MESSAGE(
      read(R"({"output_type": "loglikelihood", "documents": "docs.jsonl", "doc_to_text": "{{a}}"})",
           R"({"continuation": "x"})"),
      "docs.jsonl:1: template \"{{a}}\": the document has no field 'a'");
}

}  // namespace
}  // namespace krait
