#include <algorithm>
#include <cmath>
#include <sstream>

#include "apps/process.h"
#include "krait/io/npy.h"

namespace krait::cli {
namespace {

using Words = std::vector<std::string>;

const Words kTiny = {"mamba1-tiny",   "mamba2-tiny",    "mamba2attn-tiny", "transformerpp-tiny",
                     "hf-mamba-tiny", "hf-mamba2-tiny", "hf-gptneox-tiny"};

std::vector<std::int64_t> values(const Tensor& ids) {
  const Tensor flat = ids.to(DType::i64).contiguous();
  return {flat.data<std::int64_t>(), flat.data<std::int64_t>() + flat.numel()};
}

TEST(Generate, GreedyIdsAreTheGoldenOnes) {
  const io::Scratch scratch;
  const std::string out = (scratch / "out.npy").string();
  for (const std::string& model : kTiny) {
    SCOPED_TRACE(model);
    const Tensor expected = io::read_npy(golden(model + "/greedy_ids.npy"));
    const Tensor prompt = io::read_npy(golden(model + "/prompt_ids.npy"));
    const std::string length = std::to_string(expected.size(1) - prompt.size(1));
    krait_ok({"generate", "--model", golden(model), "--ids", golden(model + "/prompt_ids.npy"),
              "--max-new-tokens", length, "--top-k", "1", "--ignore-eos", "--out", out});
    const Tensor ids = io::read_npy(out);
    EXPECT_EQ(ids.dtype(), DType::i64);
    EXPECT_EQ(ids.shape(), expected.shape());
    EXPECT_EQ(values(ids), values(expected));
  }
}

TEST(Generate, ZeroTemperatureIsTopOne) {
  const Words common = {"generate", "--prompt", "ROMEO:", "--max-new-tokens", "20"};
  Words a = common;
  a.insert(a.end(), {"--temperature", "0"});
  Words b = common;
  b.insert(b.end(), {"--top-k", "1"});
  const Outcome greedy = krait_ok(a);
  EXPECT_EQ(greedy.out, krait_ok(b).out);
  EXPECT_TRUE(greedy.out.starts_with("ROMEO:")) << greedy.out;
  EXPECT_GT(greedy.out.size(), 20U);
  b.push_back("--reference");
  EXPECT_EQ(greedy.out, krait_ok(b).out);
}

TEST(Generate, TheSeedDecides) {
  const auto text = [](const std::string& seed) {
    return krait_ok({"generate", "--prompt", "ROMEO:", "--max-new-tokens", "30", "--seed", seed}).out;
  };
  EXPECT_EQ(text("7"), text("7"));
  EXPECT_NE(text("7"), text("8"));
  // Threads do not.
  EXPECT_EQ(text("7"), krait_ok({"generate", "--prompt", "ROMEO:", "--max-new-tokens", "30", "--seed", "7",
                                 "--threads", "1"})
                           .out);
}

TEST(Generate, VerboseTellsSeedAndSpeed) {
  const Outcome outcome = krait({"generate", "--prompt", "ROMEO:", "--max-new-tokens", "5", "--verbose"});
  EXPECT_EQ(outcome.code, 0);
  EXPECT_NE(outcome.err.find("krait: seed "), std::string::npos) << outcome.err;
  EXPECT_NE(outcome.err.find("tokens per second"), std::string::npos) << outcome.err;
}

TEST(Generate, StopTextIsNotPrinted) {
  const Words words = {"generate", "--prompt", "ROMEO:", "--max-new-tokens", "40", "--temperature", "0"};
  const std::string whole = krait_ok(words).out.substr(6);
  ASSERT_GT(whole.size(), 30U);
  Words stopped = words;
  const std::string stop = whole.substr(15, 6);
  stopped.insert(stopped.end(), {"--stop", "never to be seen", "--stop", stop});
  EXPECT_EQ(krait_ok(stopped).out, "ROMEO:" + whole.substr(0, whole.find(stop)) + "\n");
}

TEST(Generate, JsonSaysEverything) {
  const auto root = krait_ok({"generate", "--prompt", "ROMEO:", "--max-new-tokens", "12", "--seed", "3",
                              "--json", "--logprobs"})
                        .json();
  ASSERT_EQ(root["sequences"].size(), 1U);
  const auto& sequence = root["sequences"][0];
  EXPECT_EQ(sequence["prompt"], "ROMEO:");
  EXPECT_EQ(sequence["ids"].size(),
            sequence["prompt_tokens"].get<std::size_t>() + root["new_tokens"].get<std::size_t>());
  EXPECT_EQ(sequence["logprobs"].size(), root["new_tokens"].get<std::size_t>());
  for (const auto& logprob : sequence["logprobs"]) EXPECT_LE(logprob.get<double>(), 0.0);
  EXPECT_EQ(sequence["finish_reason"], "length");
  EXPECT_EQ(root["seed"], 3);
  EXPECT_EQ("ROMEO:" + sequence["text"].get<std::string>() + "\n",
            krait_ok({"generate", "--prompt", "ROMEO:", "--max-new-tokens", "12", "--seed", "3"}).out);
}

TEST(Generate, ABatchIsItsPromptsOneByOne) {
  const io::Scratch scratch;
  const Words prompts = {"ROMEO:", "JULIET:\tO Romeo, Romeo! wherefore art thou", "To"};
  const std::string file =
      scratch.put("prompts.txt", prompts[0] + "\n" + prompts[1] + "\n" + prompts[2] + "\n").string();
  const std::string out = (scratch / "out.npy").string();
  const Outcome batch = krait_ok(
      {"generate", "--prompt-file", file, "--batch", "--max-new-tokens", "16", "--top-k", "1", "--out", out});
  std::string one_by_one;
  for (const std::string& prompt : prompts)
    one_by_one += krait_ok({"generate", "--prompt", prompt, "--max-new-tokens", "16", "--top-k", "1"}).out;
  EXPECT_EQ(batch.out, one_by_one);
  EXPECT_EQ(io::read_npy(out).size(0), 3);
}

TEST(Generate, PromptsFromFilesAndPipes) {
  const io::Scratch scratch;
  const std::string file = scratch.put("prompt.txt", "ROMEO:\nO, she\n").string();
  const Words tail = {"--max-new-tokens", "8", "--top-k", "1"};
  const auto text = [&tail](Words words, std::string_view input = "") {
    words.insert(words.end(), tail.begin(), tail.end());
    return krait_ok(words, input).out;
  };
  const std::string expected = text({"generate", "--prompt", "ROMEO:\nO, she"});
  EXPECT_EQ(text({"generate", "--prompt-file", file}), expected);
  EXPECT_EQ(text({"generate", "--prompt-file", "-"}, "ROMEO:\nO, she\n"), expected);
}

TEST(Generate, LogprobsAreOneLineAToken) {
  const Outcome outcome =
      krait_ok({"generate", "--prompt", "ROMEO:", "--max-new-tokens", "9", "--top-k", "1", "--logprobs"});
  std::istringstream lines(outcome.out);
  int count = 0;
  std::string text;
  for (std::string line; std::getline(lines, line); ++count) {
    const auto tab = line.rfind('\t');
    ASSERT_NE(tab, std::string::npos) << line;
    text += nlohmann::json::parse(line.substr(tab + 1)).get<std::string>();
  }
  EXPECT_EQ(count, 9) << outcome.out;
  EXPECT_EQ("ROMEO:" + text + "\n",
            krait_ok({"generate", "--prompt", "ROMEO:", "--max-new-tokens", "9", "--top-k", "1"}).out);
}

TEST(Generate, WithoutATokenizerIdsArePrinted) {
  const std::string model = golden("mamba2-tiny");
  const Outcome outcome = krait_ok({"generate", "--model", model, "--ids", model + "/prompt_ids.npy",
                                    "--max-new-tokens", "4", "--top-k", "1", "--ignore-eos"});
  const Tensor expected = io::read_npy(golden("mamba2-tiny/greedy_ids.npy")).to(DType::i64).contiguous();
  std::string lines;
  for (int row = 0; row < 2; ++row)
    for (int i = 20; i < 24; ++i)
      lines += std::to_string(expected.select(0, row).span<std::int64_t>()[static_cast<std::size_t>(i)]) +
               (i == 23 ? "\n" : " ");
  EXPECT_EQ(outcome.out, lines);
}

TEST(Logits, AreTheGoldenOnes) {
  const io::Scratch scratch;
  const std::string out = (scratch / "out.npy").string();
  for (const std::string& model : kTiny) {
    SCOPED_TRACE(model);
    krait_ok({"logits", "--model", golden(model), "--ids", golden(model + "/input_ids.npy"), "--out", out});
    const Tensor logits = io::read_npy(out);
    const Tensor expected = io::read_npy(golden(model + "/logits.npy"));
    ASSERT_EQ(logits.dtype(), DType::f32);
    ASSERT_EQ(logits.shape(), expected.shape());
    double largest = 0.0;
    for (std::int64_t i = 0; i < logits.numel(); ++i)
      largest = std::max<double>(largest, std::abs(logits.data<float>()[i] - expected.data<float>()[i]));
    EXPECT_LT(largest, 5e-4);
  }
}

}  // namespace
}  // namespace krait::cli
