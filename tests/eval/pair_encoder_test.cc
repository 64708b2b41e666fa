#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "io/scratch.h"
#include "krait/eval/likelihood.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden;
using Ids = std::vector<std::int64_t>;

class PairEncoderTest : public ::testing::Test {
 protected:
  PairEncoderTest()
      : tokenizer_(Tokenizer::from_file(golden("eval") / "tokenizer.json")), encoder_(tokenizer_, 0) {}

  void expect_pair(std::string_view context, std::string_view continuation, std::string_view first,
                   std::string_view second) {
    const Continuation pair = encoder_.encode(context, continuation);
    EXPECT_EQ(tokenizer_.decode(pair.context), first);
    EXPECT_EQ(tokenizer_.decode(pair.continuation), second);
    Ids all = pair.context;
    all.insert(all.end(), pair.continuation.begin(), pair.continuation.end());
    EXPECT_EQ(all, tokenizer_.encode(std::string(context).append(continuation)));
  }

  Tokenizer tokenizer_;
  PairEncoder encoder_;
};

TEST_F(PairEncoderTest, CutsTheWholeWhereTheContextEnds) {
  expect_pair("Who is it?", " the king", "Who is it?", " the king");
  expect_pair("Who is it? ", "the king", "Who is it?", " the king");
  expect_pair("Who is it?\n\u00a0 ", "the king", "Who is it?", "\n\u00a0 the king");
  // A token across the border goes to the side that the count of tokens says.
  const Continuation pair = encoder_.encode("h", "e king");
  EXPECT_EQ(tokenizer_.encode("he").size(), 1U);
  EXPECT_EQ(pair.context, tokenizer_.encode("h"));
  EXPECT_EQ(tokenizer_.decode(pair.continuation), " king");
  EXPECT_MESSAGE(encoder_.encode("h", "e"), "no tokens of its own");
}

TEST_F(PairEncoderTest, EmptyContexts) {
  for (const char* context : {"", "  \n"}) {
    const Continuation pair = encoder_.encode(context, "the king");
    EXPECT_EQ(pair.context, Ids{0});
    EXPECT_EQ(pair.continuation, tokenizer_.encode(std::string(context) + "the king"));
  }
  const Continuation begun = encoder_.encode("", "<|endoftext|>the king");
  EXPECT_EQ(begun.context, Ids{0});
  EXPECT_EQ(begun.continuation, tokenizer_.encode("the king"));
  EXPECT_MESSAGE(encoder_.encode("", ""), "no tokens of its own");
}

TEST_F(PairEncoderTest, AddsWhatTheTokenizerAddsToTexts) {
  auto root = nlohmann::json::parse(io::content_of(golden("eval") / "tokenizer.json"));
  root["post_processor"] = nlohmann::json::parse(R"({
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}})");
  PairEncoder encoder(Tokenizer::from_json(root.dump(), "with a beginning"), 0);
  Ids king = tokenizer_.encode(" king");
  const Continuation pair = encoder.encode("he", " king");
  EXPECT_EQ(pair.context, (Ids{0, tokenizer_.encode("he")[0]}));
  EXPECT_EQ(pair.continuation, king);
  // Not twice, and not in front of a continuation without context.
  EXPECT_EQ(encoder.encode("<|endoftext|>he", " king").context, pair.context);
  EXPECT_EQ(encoder.encode("", " king").continuation, king);
  king.insert(king.begin(), 0);
  EXPECT_EQ(encoder.encode_text(" king"), king);
}

class CheckpointTest : public ::testing::Test {
 protected:
  ModelFiles files(const std::string& config, const std::string& tokenizer_config) {
    ModelFiles files;
    files.name = "m";
    files.config_json = config;
    files.tokenizer_path = scratch_.put("tokenizer.json", "");
    if (!tokenizer_config.empty()) scratch_.put("tokenizer_config.json", tokenizer_config);
    return files;
  }
  io::Scratch scratch_;
  Tokenizer tokenizer_ = gpt_neox_tokenizer();
};

TEST_F(CheckpointTest, PrefixToken) {
  const std::int64_t a = *tokenizer_.token_to_id("a");
  const std::int64_t b = *tokenizer_.token_to_id("b");
  EXPECT_EQ(
      prefix_token_of(files(R"({"bos_token_id": 9})", R"({"bos_token": "a", "eos_token": "b"})"), tokenizer_),
      a);
  EXPECT_EQ(prefix_token_of(files("{}", R"({"bos_token": null, "eos_token": {"content": "b"}})"), tokenizer_),
            b);
  EXPECT_EQ(prefix_token_of(files(R"({"bos_token_id": 9, "eos_token_id": 8})", "{}"), tokenizer_), 9);
  EXPECT_EQ(prefix_token_of(files(R"({"bos_token_id": null, "eos_token_id": [8, 7]})", "{}"), tokenizer_), 8);
  EXPECT_EQ(prefix_token_of(files("{}", "{}"), tokenizer_), 0);  // <|endoftext|>
  scratch_.put("special_tokens_map.json", R"({"bos_token": "b"})");
  EXPECT_EQ(prefix_token_of(files("{}", "{}"), tokenizer_), b);
  EXPECT_MESSAGE(prefix_token_of(files("{}", "[]"), tokenizer_),
                 "tokenizer_config.json: is not a JSON object");
}

TEST_F(CheckpointTest, NoPrefixToken) {
  std::string json = io::content_of(golden("eval") / "tokenizer.json");
  for (std::size_t at; (at = json.find("<|endoftext|>")) != std::string::npos;)
    json.replace(at, 13, "<|end|>");
  EXPECT_MESSAGE(prefix_token_of(files("{}", "{}"), Tokenizer::from_json(json, "without")),
                 "m: neither tokenizer_config.json nor config.json names a token");
}

TEST_F(CheckpointTest, MaxLength) {
  EXPECT_EQ(
      max_length_of(files(R"({"max_position_embeddings": 512, "n_ctx": 7})", R"({"model_max_length": 100})")),
      512);
  EXPECT_EQ(max_length_of(files("{}", R"({"model_max_length": 100})")), 100);
  EXPECT_EQ(max_length_of(files("{}", R"({"model_max_length": 1000000000000000019884624838656})")), 2048);
  EXPECT_EQ(max_length_of(files("{}", "{}")), 2048);
  EXPECT_MESSAGE(max_length_of(files(R"({"n_ctx": 0})", "{}")), "n_ctx is 0");
}

}  // namespace
}  // namespace krait
