#include <filesystem>

#include "apps/process.h"

namespace krait::cli {
namespace {

class Eval : public testing::Test {
 protected:
  // A checkpoint with a tokenizer, which the golden ones lack.
  Eval() {
    for (const char* name : {"hf-mamba-tiny/config.json", "hf-mamba-tiny/model.safetensors",
                             "eval/tokenizer.json", "eval/tokenizer_config.json"})
      std::filesystem::copy(golden(name), scratch_.path());
  }
  [[nodiscard]] std::string path(std::string_view name) const { return (scratch_ / name).string(); }

  io::Scratch scratch_;
  std::string model_ = scratch_.path().string();
};

TEST_F(Eval, GivesTheResultsOfTheHarness) {
  const auto runs = nlohmann::json::parse(read_file(golden("eval/results.json")));
  const Outcome outcome =
      krait_ok({"eval", "--model", model_, "--tasks", golden("eval/tasks"), "--max-length", "512", "--json",
                "--output", path("out.json"), "--samples", path("samples.jsonl")});
  EXPECT_EQ(read_file(path("out.json")), outcome.out);
  const auto root = outcome.json();
  ASSERT_EQ(root["results"].size(), 4U);
  for (const auto& [task, wanted] : runs[0]["tasks"].items()) {
    const auto& found = root["results"][task];
    EXPECT_EQ(found["alias"], task);
    EXPECT_EQ(found["sample_len"], wanted["documents"].size());
    for (const auto& [metric, value] : wanted["metrics"].items())
      EXPECT_NEAR(found[metric + ",none"].get<double>(), value.get<double>(),
                  1e-5 * std::max(1.0, value.get<double>()))
          << task << " " << metric;
  }
  EXPECT_EQ(root["results"]["tiny_texts"]["bits_per_byte_stderr,none"], "N/A");
  EXPECT_EQ(root["higher_is_better"]["tiny_last_word"]["perplexity"], false);
  EXPECT_EQ(root["config"]["max_length"], 512);
  EXPECT_EQ(root["config"]["prefix_token"], 0);

  std::istringstream samples(read_file(path("samples.jsonl")));
  std::map<std::string, std::size_t> count;
  for (std::string line; std::getline(samples, line);) {
    const auto sample = nlohmann::json::parse(line);
    const std::string task = sample["task"];
    EXPECT_EQ(sample["doc_id"], count[task]);
    const auto& wanted = runs[0]["tasks"][task]["documents"][count[task]++];
    ASSERT_EQ(sample["log_likelihoods"].size(), wanted["log_likelihoods"].size());
    for (std::size_t i = 0; i < sample["log_likelihoods"].size(); ++i)
      EXPECT_NEAR(sample["log_likelihoods"][i].get<double>(), wanted["log_likelihoods"][i].get<double>(),
                  1e-4);
    EXPECT_EQ(sample["is_greedy"], wanted["is_greedy"]);
  }
  EXPECT_EQ(count.size(), 4U);
}

TEST_F(Eval, PrintsATable) {
  const std::string tasks = golden("eval/tasks/choice.json");
  const Outcome table = krait_ok(
      {"eval", "--model", model_, "--tasks", tasks, golden("eval/tasks/texts.json"), "--batch-size", "2"});
  EXPECT_EQ(table.out.substr(0, table.out.find("tiny_texts")),
            "task         documents  metric                       value  std. error\n"
            "tiny_choice          8  acc                         0.1250      0.1250\n"
            "tiny_choice          8  acc_norm                    0.3750      0.1830\n"
            "tiny_choice          8  acc_bytes                   0.3750      0.1830\n"
            "tiny_choice          8  acc_mutual_info             0.2500      0.1637\n");
  const auto first = krait_ok({"eval", "--model", model_, "--tasks", tasks, "--limit", "3", "--json",
                               "--bootstrap-iterations", "0"})
                         .json();
  EXPECT_EQ(first["results"]["tiny_choice"]["sample_len"], 3);
  EXPECT_EQ(first["results"]["tiny_choice"]["acc_stderr,none"], "N/A");
}

TEST_F(Eval, TheBundledModelTakesItsOwnPrefix) {
  const auto path = scratch_.put("texts.jsonl", "{\"text\": \"ROMEO:\\nBut soft!\"}\n");
  const auto root = krait_ok({"eval", "--tasks", path.string(), "--json"}).json();
  EXPECT_LT(root["results"]["texts"]["bits_per_byte,none"].get<double>(), 6.0);
  const auto other = krait_ok({"eval", "--tasks", path.string(), "--json", "--prefix-token", "5"}).json();
  EXPECT_NE(other["results"]["texts"]["bits_per_byte,none"], root["results"]["texts"]["bits_per_byte,none"]);
}

TEST_F(Eval, Refusals) {
  expect_refusal({"eval"}, 2, {"--tasks", "required"});
  expect_refusal({"eval", "--tasks", "x", "--limit", "0"}, 2, {"--limit", "'0'"});
  expect_refusal({"eval", "--tasks", path("none.json")}, 1, {"none.json"});
  scratch_.put("bad.json", "{\"output_type\": \"generate_until\"}");
  expect_refusal({"eval", "--tasks", path("bad.json")}, 1, {"bad.json", "generate_until", "multiple_choice"});
  expect_refusal(
      {"eval", "--tasks", golden("eval/tasks/choice.json"), "--model", model_, "--max-length", "3"}, 1,
      {"task tiny_choice, document ", "max_length = 3"});
  expect_refusal(
      {"eval", "--tasks", golden("eval/tasks/choice.json"), "--model", model_, "--prefix-token", "999"}, 1,
      {"999"});
  // Before any work, of which this would be the first complaint.
  for (const std::string option : {"--output", "--samples"})
    expect_refusal({"eval", "--tasks", path("none.json"), option, path("nowhere/out")}, 1, {"nowhere"});
}

}  // namespace
}  // namespace krait::cli
