// krait train as a user, and a failing machine, meet it.
#include <algorithm>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "apps/process.h"

namespace krait::cli {
namespace {

namespace fs = std::filesystem;
using Words = std::vector<std::string>;

constexpr const char* kConfig = R"({"d_model": 16, "n_layer": 1, "vocab_size": 1024, "rms_norm": true,
  "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 16}, "tie_embeddings": true})";

class Train : public testing::Test {
 protected:
  Train() {
    const std::string text = read_file(std::string(KRAIT_SOURCE_DIR) + "/tests/data/tinyshakespeare.txt");
    scratch_.put("config.json", kConfig);
    scratch_.put("train.txt", text.substr(0, 20000));
    scratch_.put("val.txt", text.substr(1100000, 1500));
  }

  [[nodiscard]] std::string path(std::string_view name) const { return (scratch_ / name).string(); }
  // A short run into `out`; options in `more` take the place of its own.
  [[nodiscard]] Words command(const std::string& out, const Words& more = {}) const {
    const std::string tokenizer = std::string(KRAIT_MODELS_DIR) + "/shakespeare";
    const std::vector<std::pair<std::string, std::string>> own = {{"--config", path("config.json")},
                                                                  {"--tokenizer", tokenizer},
                                                                  {"--data", path("train.txt")},
                                                                  {"--val", path("val.txt")},
                                                                  {"--out", path(out)},
                                                                  {"--steps", "60"},
                                                                  {"--batch-size", "2"},
                                                                  {"--seq-len", "32"},
                                                                  {"--eval-every", "20"},
                                                                  {"--save-every", "7"},
                                                                  {"--ema", "0.9"},
                                                                  {"--dropout", "0.1"}};
    Words words = {"train"};
    for (const auto& [option, value] : own)
      if (std::find(more.begin(), more.end(), option) == more.end())
        words.insert(words.end(), {option, value});
    words.insert(words.end(), more.begin(), more.end());
    return words;
  }
  [[nodiscard]] std::int64_t lines_in(const std::string& file) const {
    const std::string text = read_file(path(file));
    return std::count(text.begin(), text.end(), '\n');
  }
  // Until a run has written that much.
  void wait_for_lines(const std::string& file, std::int64_t count) const {
    for (int i = 0; i < 60000 && lines_in(file) < count; ++i) ::usleep(1000);
    ASSERT_GE(lines_in(file), count) << file;
  }

  io::Scratch scratch_;
};

TEST_F(Train, LeavesAModelThatOtherCommandsLoad) {
  const Outcome run = krait_ok(command("out"));
  EXPECT_NE(run.out.find("60 steps"), std::string::npos) << run.out;
  EXPECT_NE(run.out.find("step 20  validation loss "), std::string::npos) << run.out;
  EXPECT_NE(run.out.find("the model is in " + path("out")), std::string::npos) << run.out;
  EXPECT_EQ(lines_in("out/metrics.jsonl"), 63);
  EXPECT_EQ(krait_ok({"info", "--model", path("out"), "--json"}).json()["n_layer"], 1);
  const auto score =
      krait_ok({"score", "--model", path("out"), "--text", path("val.txt"), "--block", "32", "--json"})
          .json();
  std::istringstream lines(read_file(path("out/metrics.jsonl")));
  nlohmann::json last;
  for (std::string line; std::getline(lines, line);) last = nlohmann::json::parse(line);
  EXPECT_DOUBLE_EQ(last["val_loss"].get<double>(), score["loss"].get<double>());
  EXPECT_DOUBLE_EQ(last["val_bits_per_byte"].get<double>(), score["bits_per_byte"].get<double>());
  krait_ok({"generate", "--model", path("out"), "--prompt", "a", "--max-new-tokens", "3"});
  krait_ok({"info", "--model", path("out/checkpoints/step-60")});
}

// Into a file or a pipe: a plain line each twentieth of the run, however short it is.
TEST_F(Train, ShowsHowFarItIsWithoutATerminal) {
  const auto lines_with = [](const std::string& text, const std::string& part) {
    std::istringstream lines(text);
    std::int64_t count = 0;
    for (std::string line; std::getline(lines, line);) count += line.find(part) != std::string::npos ? 1 : 0;
    return count;
  };
  const Outcome run = krait_ok(command("out"));
  EXPECT_EQ(lines_with(run.out, "/60  loss "), 20) << run.out;
  EXPECT_EQ(lines_with(run.out, "step 30/60  loss "), 1) << run.out;
  EXPECT_EQ(lines_with(run.out, "step 31/60  loss "), 0) << run.out;
  const Outcome shorter = krait_ok(command("short", {"--steps", "3"}));
  EXPECT_EQ(lines_with(shorter.out, "/3  loss "), 3) << shorter.out;
  EXPECT_EQ(run.out.find_first_of("\r\x1b"), std::string::npos) << "what only a terminal understands";
}

TEST_F(Train, PrintsWhatItWrites) {
  const Outcome run = krait_ok(command("out", {"--json", "--quiet", "--log-every", "6"}));
  std::istringstream lines(run.out);
  std::string all;
  std::string line;
  for (std::string next; std::getline(lines, next); line = next)
    if (!line.empty()) all += line + "\n";
  EXPECT_EQ(all, read_file(path("out/metrics.jsonl")));
  const auto end = nlohmann::json::parse(line);
  EXPECT_EQ(end["end"], "finished");
  EXPECT_EQ(end["steps"], 60);
  EXPECT_EQ(krait_ok(command("silent", {"--quiet", "--steps", "2"})).out, "");
  EXPECT_EQ(lines_in("silent/metrics.jsonl"), 3);
}

TEST_F(Train, KilledAtAnyMomentAndResumedIsUninterrupted) {
  krait_ok(command("whole", {"--quiet"}));
  const Words resume = command("killed", {"--quiet", "--resume"});
  // Each process is killed some lines further on, and the last one gets to the end.
  for (const std::int64_t lines : {1, 9, 20, 22, 37, 50}) {
    Process process(resume);
    wait_for_lines("killed/metrics.jsonl", lines);
    process.send(SIGKILL);
    EXPECT_EQ(process.wait().code, -SIGKILL) << lines;
    // Half a line, as a full disk or a power failure leave it.
    std::ofstream(path("killed/metrics.jsonl"), std::ios::app) << "{\"step\":";
  }
  krait_ok(resume);
  for (const std::string name :
       {"model.safetensors", "average.safetensors", "checkpoints/step-60/model.safetensors",
        "checkpoints/step-60/optimizer.safetensors", "config.json"})
    EXPECT_TRUE(read_file(path("killed/" + name)) == read_file(path("whole/" + name))) << name;
  EXPECT_EQ(lines_in("killed/metrics.jsonl"), lines_in("whole/metrics.jsonl"));
}

TEST_F(Train, SignalsSaveAndEnd) {
  for (const int signal : {SIGINT, SIGTERM}) {
    SCOPED_TRACE(signal);
    const std::string out = "out-" + std::to_string(signal);
    Process process(command(out, {"--steps", "100000", "--save-every", "0"}));
    wait_for_lines(out + "/metrics.jsonl", 5);
    process.send(signal);
    const Outcome outcome = process.wait();
    EXPECT_EQ(outcome.code, 130);
    EXPECT_EQ(outcome.err, "");
    EXPECT_NE(outcome.out.find("--resume goes on"), std::string::npos) << outcome.out;
    ASSERT_TRUE(fs::exists(path(out + "/checkpoints")));
    EXPECT_EQ(std::distance(fs::directory_iterator(path(out + "/checkpoints")), fs::directory_iterator()), 1);
    EXPECT_FALSE(fs::exists(path(out + "/.lock")));
  }
}

TEST_F(Train, ResumingNeedsNoMoreThanTheDirectory) {
  Process process(command("out", {"--quiet"}));
  wait_for_lines("out/metrics.jsonl", 12);
  process.send(SIGINT);
  EXPECT_EQ(process.wait().code, 130);
  krait_ok({"train", "--resume", "--out", path("out"), "--quiet"});
  EXPECT_EQ(lines_in("out/metrics.jsonl"), 63);
  const std::string before = read_file(path("out/model.safetensors"));
  const Outcome again = krait_ok({"train", "--resume", "--out", path("out")});
  EXPECT_NE(again.out.find("finished before, after 60 steps"), std::string::npos) << again.out;
  EXPECT_TRUE(read_file(path("out/model.safetensors")) == before);
}

TEST_F(Train, OneRunAtATime) {
  Process process(command("out", {"--quiet", "--steps", "100000"}));
  wait_for_lines("out/metrics.jsonl", 3);
  expect_refusal(command("out", {"--resume"}), 1, {path("out"), "in use by another run"});
  expect_refusal(command("out"), 1, {path("out"), "in use by another run"});
  process.send(SIGKILL);
  process.wait();
  expect_refusal(command("out"), 1, {path("out"), "not empty", "--resume"});
}

TEST_F(Train, SettingsFromAFileAndTheLineBeforeIt) {
  scratch_.put("run.toml",
               "config = \"" + path("config.json") + "\"\ntokenizer = \"" + std::string(KRAIT_MODELS_DIR) +
                   "/shakespeare\"\ndata = \"" + path("train.txt") +
                   "\"\nsteps = 2\nseq-len = 16\nbatch_size = 2\nlr = 0.5\nno_decay = 'D,norm'\n");
  krait_ok({"train", "--settings", path("run.toml"), "--out", path("out"), "--lr", "0.25", "--quiet"});
  const auto written = nlohmann::json::parse(read_file(path("out/settings.json")));
  EXPECT_EQ(written["lr"], 0.25);
  EXPECT_EQ(written["steps"], 2);
  EXPECT_EQ(written["seq_len"], 16);
  EXPECT_EQ(written["no_decay"], nlohmann::json({"D", "norm"}));
  EXPECT_EQ(written["betas"], nlohmann::json({0.9, 0.95}));
  EXPECT_EQ(written["schedule"], "constant");
}

TEST_F(Train, Refusals) {
  expect_refusal({"train"}, 1, {"neither model nor config"});
  expect_refusal({"train", "--resume"}, 2, {"--resume needs --out"});
  expect_refusal(command("o", {"--lr", "1", "--lr", "2"}), 2, {"--lr: given 2 times, expected once"});
  expect_refusal(command("o", {"--schedule", "sine"}), 2,
                 {"--schedule", "'sine'", "constant|linear|cosine|wsd"});
  expect_refusal(command("o", {"--betas", "0.9,x"}), 2, {"--betas", "'0.9,x'", "numbers"});
  expect_refusal(command("o", {"--betas", "0.9"}), 1, {"betas"});
  expect_refusal(command("o", {"--dropout", "1"}), 2, {"--dropout", "'1'"});
  expect_refusal(command("o", {"--no-decay", "("}), 1, {"no_decay", "'('"});
  expect_refusal(command("o", {"--epochs", "1"}), 1, {"steps", "epochs"});
  expect_refusal(command("o", {"--settings", path("no.toml")}), 1, {"no.toml"});
  expect_refusal(command("o", {"--model", "m"}), 1, {"model", "config"});
  expect_refusal(command("o", {"--val", path("no.txt")}), 1, {"no.txt"});
  expect_refusal(command("config.json"), 1, {"config.json"});
  EXPECT_FALSE(fs::exists(path("o")));
}

}  // namespace
}  // namespace krait::cli
