// krait tokenizer train and krait data pack as a user meets them.
#include <filesystem>

#include "apps/process.h"

namespace krait::cli {
namespace {

using Words = std::vector<std::string>;

class Data : public testing::Test {
 protected:
  Data() {
    scratch_.put("books.txt", "the old man and the old sea, the end");
    scratch_.put("web.jsonl", "{\"text\": \"the sea\"}\n{\"text\": \"an old man\"}\n");
  }
  [[nodiscard]] std::string path(std::string_view name) const { return (scratch_ / name).string(); }
  // krait tokenizer train with these options.
  [[nodiscard]] Words train(const Words& more) const {
    Words words = {"tokenizer", "train", "--data", path("books.txt"), path("web.jsonl")};
    words.insert(words.end(), more.begin(), more.end());
    return words;
  }
  [[nodiscard]] Words pack(const std::string& tokenizer, const std::string& data) const {
    return {"data", "pack", "--data", data, "--tokenizer", tokenizer, "--out", path("packed.bin")};
  }

  io::Scratch scratch_;
};

TEST_F(Data, TokenizerIsTrained) {
  const Outcome outcome = krait_ok(train({"--vocab-size", "262", "--out", path("tokenizer.json")}));
  EXPECT_EQ(outcome.out, path("tokenizer.json") + ": 262 tokens\n");
  EXPECT_EQ(krait_ok({"tokenize", "--tokenizer", path("tokenizer.json")}, "<|endoftext|>").out, "0\n");
  EXPECT_EQ(krait_ok(train({"--vocab-size", "300", "--out", path("own.json"), "--special-token", "<a>",
                            "--special-token", "<b>", "--min-frequency", "3", "-q"}))
                .out,
            "");
  EXPECT_EQ(krait_ok({"tokenize", "--tokenizer", path("own.json")}, "<a><b>").out, "0 1\n");
  (void)krait_ok(train({"--vocab-size", "256", "--out", path("none.json"), "--no-special-token"}));
  EXPECT_EQ(krait_ok({"tokenize", "--tokenizer", path("none.json")}, "!").out, "0\n");
}

TEST_F(Data, SmallTextsMakeSmallVocabularies) {
  const Outcome outcome = krait(train({"--vocab-size", "5000", "--out", path("tokenizer.json")}));
  EXPECT_EQ(outcome.code, 0);
  EXPECT_NE(outcome.err.find("fewer than the 5000 asked for"), std::string::npos) << outcome.err;
}

TEST_F(Data, WrongTrainingChangesNothing) {
  const std::string out = scratch_.put("tokenizer.json", "old").string();
  expect_refusal(train({"--vocab-size", "100", "--out", out}), 1, {"vocabulary size is 100", "at least 257"});
  expect_refusal(train({"--vocab-size", "x", "--out", out}), 2, {"--vocab-size", "'x'"});
  expect_refusal(train({"--out", out}), 2, {"--vocab-size", "required"});
  expect_refusal(train({"--vocab-size", "300"}), 2, {"--out", "required"});
  expect_refusal(train({"--vocab-size", "300", "--out", out, "--no-special-token", "--special-token", "a"}),
                 2, {"--no-special-token", "excludes", "--special-token"});
  expect_refusal(train({"--vocab-size", "300", "--out", path("no/where.json")}), 1, {path("no/where.json")});
  const std::string empty = scratch_.put("empty.txt", "").string();
  expect_refusal({"tokenizer", "train", "--data", empty, "--vocab-size", "300", "--out", out}, 1,
                 {empty, "is empty, expected text"});
  expect_refusal({"tokenizer"}, 2, {"subcommand is required", "krait tokenizer --help"});
  EXPECT_EQ(io::content_of(out), "old");
}

TEST_F(Data, TextsArePacked) {
  const std::string shakespeare = std::string(KRAIT_MODELS_DIR) + "/shakespeare";
  for (const std::string& tokenizer :
       {shakespeare, shakespeare + "/tokenizer.json", std::string("gpt-neox")}) {
    const Outcome outcome = krait_ok(pack(tokenizer, path("web.jsonl")));
    EXPECT_NE(outcome.out.find(" tokens in 2 documents, from 43 bytes of text\n"), std::string::npos)
        << outcome.out;
  }
  EXPECT_TRUE(io::content_of(scratch_ / "packed.bin").starts_with("KRAITTOK"));
}

TEST_F(Data, WrongPackingChangesNothing) {
  scratch_.put("packed.bin", "old");
  const std::string bad = scratch_.put("bad.jsonl", "{\"text\": \"a\"}\n{\"no\": 1}\n").string();
  expect_refusal(pack("gpt-neox", bad), 1, {bad, "line 2 has no text"});
  expect_refusal(pack("gpt-neox", path("nowhere.txt")), 1, {path("nowhere.txt")});
  expect_refusal(pack(path("nowhere"), path("web.jsonl")), 1, {path("nowhere"), "no such file"});
  expect_refusal(pack(scratch_.path().string(), path("web.jsonl")), 1,
                 {scratch_.path().string(), "config.json"});
  expect_refusal({"data", "pack", "--data", bad, "--out", path("packed.bin")}, 2,
                 {"--tokenizer", "required"});
  expect_refusal({"data"}, 2, {"subcommand is required", "krait data --help"});
  EXPECT_EQ(io::content_of(scratch_ / "packed.bin"), "old");
}

}  // namespace
}  // namespace krait::cli
