#include <sstream>

#include "apps/process.h"

namespace krait::cli {
namespace {

const std::string kTokenizer = std::string(KRAIT_MODELS_DIR) + "/gpt-neox/tokenizer.json";

std::vector<nlohmann::json> lines_of(const std::string& text) {
  std::vector<nlohmann::json> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

TEST(Tokenize, GoldenCasesThereAndBack) {
  const auto cases = nlohmann::json::parse(read_file(golden("tokenizer/cases.json")));
  std::string texts;
  std::string ids;
  for (const auto& c : cases) {
    texts += nlohmann::json{{"text", c["text"]}}.dump() + "\n";
    ids += nlohmann::json{{"ids", c["ids"]}}.dump() + "\n";
  }
  const auto encoded = lines_of(krait_ok({"tokenize", "--tokenizer", kTokenizer, "--jsonl"}, texts).out);
  const auto decoded = lines_of(krait_ok({"tokenize", "--tokenizer", kTokenizer, "--jsonl"}, ids).out);
  ASSERT_EQ(encoded.size(), cases.size());
  ASSERT_EQ(decoded.size(), cases.size());
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(cases[i]["text"].dump());
    EXPECT_EQ(encoded[i]["ids"], cases[i]["ids"]);
    EXPECT_EQ(decoded[i]["text"], cases[i]["decoded"]);
  }
}

TEST(Tokenize, SpecialTokensAreKeptUnlessSkipped) {
  const std::string line = "{\"ids\": [0, 12092]}\n";
  const auto kept = lines_of(krait_ok({"tokenize", "--tokenizer", kTokenizer, "--jsonl"}, line).out);
  EXPECT_EQ(kept.at(0)["text"], "<|endoftext|>Hello");
  const auto skipped =
      lines_of(krait_ok({"tokenize", "--tokenizer", kTokenizer, "--jsonl", "--skip-special"}, line).out);
  EXPECT_EQ(skipped.at(0)["text"], "Hello");
  EXPECT_EQ(lines_of(krait_ok({"tokenize", "--tokenizer", kTokenizer, "--jsonl"},
                              "{\"text\": \"<|endoftext|>Hello\"}\n")
                         .out)
                .at(0)["ids"],
            (nlohmann::json{0, 12092}));
}

TEST(Tokenize, PlainTextBecomesOneLineOfIds) {
  EXPECT_EQ(krait_ok({"tokenize", "--tokenizer", kTokenizer}, "Hello world").out, "12092 1533\n");
  EXPECT_EQ(krait_ok({"tokenize", "--tokenizer", kTokenizer}, "").out, "\n");
}

TEST(Tokenize, TheBundledModelHasItsOwn) {
  const auto ids = lines_of(krait_ok({"tokenize", "--jsonl"}, "{\"text\": \"ROMEO:\"}\n").out).at(0)["ids"];
  for (const auto& id : ids) EXPECT_LT(id.get<int>(), 1024);
}

}  // namespace
}  // namespace krait::cli
