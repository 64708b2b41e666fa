#include <csignal>
#include <filesystem>

#include "apps/process.h"
#include "krait/io/npy.h"

namespace krait::cli {
namespace {

using Words = std::vector<std::string>;

TEST(Usage, ErrorsExitWithTwoAndName) {
  expect_refusal({}, 2, {"subcommand is required", "krait --help"});
  expect_refusal({"sing"}, 2, {"sing"});
  expect_refusal({"generate"}, 2, {"--prompt", "--prompt-file", "--ids", "krait generate --help"});
  expect_refusal({"generate", "--prompt", "a", "--ids", "b"}, 2, {"--prompt", "excludes", "--ids"});
  expect_refusal({"generate", "--prompt", "a", "--batch"}, 2, {"--batch", "requires", "--prompt-file"});
  expect_refusal({"generate", "--prompt", "a", "--top-k", "-3"}, 2,
                 {"--top-k", "'-3'", "an integer of at least 0"});
  expect_refusal({"generate", "--prompt", "a", "--top-k", "2.5"}, 2, {"--top-k", "'2.5'", "an integer"});
  expect_refusal({"generate", "--prompt", "a", "--top-p", "nan"}, 2, {"--top-p", "'nan'", "at most 1"});
  expect_refusal({"generate", "--prompt", "a", "--temperature", "inf"}, 2, {"--temperature", "'inf'"});
  expect_refusal({"generate", "--prompt", "a", "--seed", "-1"}, 2, {"--seed", "'-1'"});
  expect_refusal({"generate", "--prompt", "a", "--max-new-tokens", "99999999999999999999"}, 2,
                 {"--max-new-tokens", "'99999999999999999999'"});
  expect_refusal({"generate", "--prompt", "a", "--device", "gpu"}, 2, {"--device", "'gpu'", "cuda:N"});
  expect_refusal({"generate", "--prompt", "a", "--dtype", "int4"}, 2,
                 {"--dtype", "'int4'", "auto|f32|bf16|f16"});
  expect_refusal({"generate", "--prompt", "a", "--threads", "-1"}, 2, {"--threads", "'-1'"});
  expect_refusal({"generate", "--prompt", "a", "--quiet", "--verbose"}, 2, {"--quiet", "--verbose"});
  expect_refusal({"generate", "--prompt", "a", "--model", ""}, 2, {"--model"});
  expect_refusal({"generate", "--prompt"}, 2, {"--prompt"});
  expect_refusal({"generate", "--prompt", "a", "--nonsense"}, 2, {"--nonsense"});
  expect_refusal({"logits", "--ids", "x.npy"}, 2, {"--out", "required"});
  expect_refusal({"score"}, 2, {"--ids", "--text"});
  expect_refusal({"score", "--text", "x", "--block", "1"}, 2, {"--block", "'1'", "at least 2"});
  expect_refusal({"score", "--ids", "x", "--block", "8"}, 2, {"--block", "requires", "--text"});
  expect_refusal({"bench", "--model", "m", "--config", "c"}, 2, {"--model", "--config"});
  expect_refusal({"bench", "--repeat", "0"}, 2, {"--repeat", "'0'"});
  expect_refusal({"bench", "op"}, 2, {"name", "required"});
  expect_refusal({"bench", "op", "linear", "--shape", "B"}, 2, {"--shape", "'B'", "B=8"});
  expect_refusal({"download"}, 2, {"model", "required"});
  expect_refusal({"tokenize", "--tokenizer", "t", "--model", "m"}, 2, {"--tokenizer", "--model"});
}

// A variable of the shell that is not set must not turn into the bundled model, or no file at all.
TEST(Usage, EmptyNamesAreRefused) {
  for (const Words& words : std::vector<Words>{{"generate", "--prompt", "a", "--model"},
                                               {"generate", "--prompt-file"},
                                               {"generate", "--ids"},
                                               {"generate", "--prompt", "a", "--out"},
                                               {"score", "--text"},
                                               {"score", "--ids"},
                                               {"tokenize", "--tokenizer"},
                                               {"bench", "--config"},
                                               {"train", "--settings"}}) {
    Words all = words;
    all.emplace_back("");
    expect_refusal(all, 2, {words.back(), "is empty, expected a value"});
  }
}

class BadInput : public testing::Test {
 protected:
  // A .npy file with these ids.
  std::string ids(const std::vector<std::int64_t>& values, const Dims& shape) const {
    const auto path = scratch_ / "ids.npy";
    io::write_npy(path, Tensor::from(values, shape));
    return path.string();
  }
  [[nodiscard]] std::string path(std::string_view name) const { return (scratch_ / name).string(); }

  io::Scratch scratch_;
};

TEST_F(BadInput, ModelsThatAreNotThere) {
  const std::string nowhere = path("nowhere");
  expect_refusal({"info", "--model", nowhere}, 1, {nowhere});
  expect_refusal({"info", "--model", "state-spaces/mamba-130m"}, 1, {"state-spaces/mamba-130m"});
  expect_refusal({"download", "state-spaces/mamba-130m"}, 1, {"state-spaces/mamba-130m"});
  expect_refusal({"download", "../../etc"}, 1, {"'../../etc'", "org/name"});
  std::filesystem::create_directory(scratch_ / "empty");
  expect_refusal({"info", "--model", path("empty")}, 1, {path("empty"), "config.json"});
}

TEST_F(BadInput, DamagedModels) {
  const auto model = scratch_ / "model";
  std::filesystem::copy(golden("mamba1-tiny"), model);
  const std::string whole = read_file(golden("mamba1-tiny/pytorch_model.bin"));
  scratch_.put("model/pytorch_model.bin", std::string_view(whole).substr(0, whole.size() / 2));
  expect_refusal({"info", "--model", model.string()}, 1, {"pytorch_model.bin"});
  scratch_.put("model/pytorch_model.bin", "");
  expect_refusal({"info", "--model", model.string()}, 1, {"pytorch_model.bin"});
  scratch_.put("model/pytorch_model.bin", whole);
  scratch_.put("model/config.json", "{\"d_model\": 64,");
  expect_refusal({"info", "--model", model.string()}, 1, {"config.json", "JSON"});
  scratch_.put("model/config.json", R"({"model_type": "gpt2"})");
  expect_refusal({"info", "--model", model.string()}, 1, {"gpt2", "mamba2"});
}

TEST_F(BadInput, Ids) {
  const std::string model = golden("mamba1-tiny");
  const std::string out = path("out.npy");
  const Words logits = {"logits", "--model", model, "--out", out, "--ids"};
  const auto with = [](Words words, const std::string& last) {
    words.push_back(last);
    return words;
  };
  expect_refusal(with(logits, path("nowhere.npy")), 1, {path("nowhere.npy")});
  expect_refusal(with(logits, ids({1, 2, 100000, 3}, {1, 4})), 1, {"100000"});
  expect_refusal(with(logits, ids({1, 2, -1, 3}, {1, 4})), 1, {"-1"});
  expect_refusal(with(logits, ids({1, 2, 3}, {3})), 1, {"ids.npy", "(3,)", "(batch, length)"});
  expect_refusal(with(logits, ids({}, {1, 0})), 1, {"ids.npy", "(1, 0)"});
  expect_refusal(with(logits, ids({}, {0, 4})), 1, {"ids.npy", "(0, 4)"});
  io::write_npy(scratch_ / "floats.npy", Tensor::from(std::vector<float>{1.0F, 2.0F}, {1, 2}));
  expect_refusal(with(logits, path("floats.npy")), 1, {"floats.npy", "f32", "expected i64"});
  scratch_.put("text.npy", "not an array");
  expect_refusal(with(logits, path("text.npy")), 1, {"text.npy"});
  expect_refusal({"score", "--model", model, "--ids", ids({1}, {1, 1})}, 1, {"1"});
  EXPECT_FALSE(std::filesystem::exists(out)) << "a refused input left a file";
}

TEST_F(BadInput, Texts) {
  expect_refusal({"generate", "--prompt", ""}, 1, {"prompt", "no tokens"});
  expect_refusal({"generate", "--prompt-file", path("nowhere.txt")}, 1, {path("nowhere.txt")});
  expect_refusal({"generate", "--prompt-file", scratch_.path().string()}, 1,
                 {scratch_.path().string(), "directory"});
  expect_refusal({"generate", "--prompt-file", scratch_.put("empty.txt", "").string(), "--batch"}, 1,
                 {"empty.txt"});
  expect_refusal({"score", "--text", path("empty.txt")}, 1, {"token"});
  // No tokenizer in the checkpoint, and its vocabulary is not GPT-NeoX's.
  expect_refusal({"generate", "--model", golden("mamba1-tiny"), "--prompt", "a"}, 1, {"tokenizer"});
  expect_refusal({"tokenize", "--tokenizer", path("nowhere.json")}, 1, {path("nowhere.json")});
  expect_refusal({"tokenize", "--tokenizer", scratch_.put("t.json", "{}").string()}, 1, {"t.json"});
}

TEST_F(BadInput, Outputs) {
  const std::string input = golden("mamba1-tiny/prompt_ids.npy");
  const std::string model = golden("mamba1-tiny");
  expect_refusal({"logits", "--model", model, "--ids", input, "--out", path("no/such/folder.npy")}, 1,
                 {"no/such/folder.npy"});
  expect_refusal({"logits", "--model", model, "--ids", input, "--out", "/dev/full"}, 1, {"/dev/full"});
  Outcome full = Process({"generate", "--prompt", "ROMEO:"}, "", "/dev/full").wait();
  EXPECT_EQ(full.code, 1);
  EXPECT_EQ(full.err, "krait: standard output: No space left on device\n");
}

TEST_F(BadInput, UnknownOperators) {
  expect_refusal({"bench", "op", "convolute"}, 1, {"convolute", "selective_scan"});
  expect_refusal({"bench", "op", "linear", "--shape", "Q=3"}, 1, {"Q"});
}

TEST_F(BadInput, JsonLines) {
  const Words words = {"tokenize", "--jsonl"};
  expect_refusal(words, 1, {"line 1", "JSON"}, "{\"text\": \n");
  expect_refusal(words, 1, {"line 1", "expected {\"text\""}, "{\"words\": 3}\n");
  expect_refusal(words, 1, {"line 1", "expected {\"text\""}, "[]\n");
  expect_refusal(words, 1, {"line 1", "1.5"}, "{\"ids\": [1.5]}\n");
  expect_refusal(words, 1, {"line 1", "99999999"}, "{\"ids\": [99999999]}\n");
  expect_refusal(words, 1, {"line 1"}, "{\"ids\": [18446744073709551615]}\n");
  expect_refusal(words, 1, {"line 1"}, std::string(100000, '[') + "\n");
}

TEST(Interrupted, EndsCleanlyWithWhatWasMade) {
  const io::Scratch scratch;
  const std::string out = (scratch / "ids.npy").string();
  Process process(
      {"generate", "--prompt", "ROMEO:", "--max-new-tokens", "1000000000", "--ignore-eos", "--out", out});
  while (process.out().size() < 100) ::usleep(1000);
  process.send(SIGINT);
  const Outcome outcome = process.wait();
  EXPECT_EQ(outcome.code, 130);
  EXPECT_EQ(outcome.err, "");
  EXPECT_TRUE(outcome.out.ends_with('\n'));
  EXPECT_GT(io::read_npy(out).size(1), 10);
}

TEST(Interrupted, AReaderThatLeavesEndsIt) {
  const std::string command =
      std::string(KRAIT_PROGRAM) +
      " generate --prompt ROMEO: --max-new-tokens 1000000000 --ignore-eos | head -c 20 >/dev/null;"
      " exit ${PIPESTATUS[0]}";
  const io::Scratch scratch;
  const auto script = scratch.put("pipe.sh", command);
  const int status = std::system(("bash " + script.string()).c_str());
  EXPECT_EQ(WEXITSTATUS(status), 128 + SIGPIPE);
}

}  // namespace
}  // namespace krait::cli
