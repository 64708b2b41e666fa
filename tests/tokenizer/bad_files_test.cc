// Files that are no tokenizer, or none that is understood: each gives one line that names the file and
// what is wrong.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "krait/core/error.h"
#include "krait/tokenizer/tokenizer.h"

namespace krait {
namespace {

using nlohmann::json;

json good() {
  return json::parse(R"({
    "added_tokens": [{"id": 3, "content": "<s>", "special": true}],
    "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}})");
}

void expect_error(const std::string& text, const std::string& part) {
  SCOPED_TRACE(text.substr(0, 300));
  try {
    (void)Tokenizer::from_json(text, "dir/bad.json");
    ADD_FAILURE() << "no error, expected one with: " << part;
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.kind(), ErrorKind::invalid_argument);
    EXPECT_EQ(message.find("dir/bad.json"), 0U) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_LT(message.size(), 500U) << message;
  }
}

// The good file with the value at `pointer` replaced.
void expect_error_with(const char* pointer, const char* value, const std::string& part) {
  json file = good();
  file[json::json_pointer(pointer)] = json::parse(value);
  expect_error(file.dump(), part);
}

TEST(BadFiles, TheGoodOneLoads) {
  const auto tokenizer = Tokenizer::from_json(good().dump(), "good.json");
  EXPECT_EQ(tokenizer.encode("ab<s>a"), (std::vector<std::int64_t>{2, 3, 0}));
}

TEST(BadFiles, NotJson) {
  expect_error("", "not JSON");
  expect_error("{", "not JSON");
  expect_error("hello", "not JSON");
  expect_error(std::string("\0\0\0", 3), "not JSON");
  expect_error("[]", "array, expected an object");
  expect_error("3", "number, expected an object");
  expect_error(good().dump() + "x", "not JSON");
  expect_error("{\"\xFF\": 1}", "not JSON");
  const std::string text = good().dump();
  for (std::size_t size = 0; size < text.size(); ++size) expect_error(text.substr(0, size), "not JSON");
}

TEST(BadFiles, DeepNesting) {
  expect_error(std::string(100000, '['), "nests deeper");
  std::string objects;
  for (int i = 0; i < 100000; ++i) objects += R"({"a":)";
  expect_error(objects, "nests deeper");
  std::string sequence = "null";
  for (int i = 0; i < 100; ++i) sequence = R"({"type":"Sequence","decoders":[)" + sequence + "]}";
  expect_error(R"({"decoder":)" + sequence + "}", "nests deeper");
}

TEST(BadFiles, MissingParts) {
  expect_error("{}", "no model");
  expect_error(R"({"model": 3})", "model is number");
  expect_error(R"({"model": {"type": "BPE"}})", "no model.vocab");
  expect_error(R"({"model": {"type": "BPE", "vocab": {}}})", "no model.merges");
  expect_error(R"({"model": {"type": "WordPiece", "vocab": {}}})", "'WordPiece' is not supported");
  expect_error(R"({"model": {"type": "Unigram", "vocab": [["a", -1.0]]}})", "'Unigram' is not supported");
}

TEST(BadFiles, Ids) {
  expect_error_with("/model/vocab/a", "1", "the tokens ");
  expect_error_with("/model/vocab/a", "-1", "has id -1");
  expect_error_with("/model/vocab/a", "1152921504606846976", "has id 1152921504606846976");
  expect_error_with("/model/vocab/a", "18446744073709551615", "has id 18446744073709551615");
  expect_error_with("/model/vocab/a", "99999999999999999999999", "expected an id");
  expect_error_with("/model/vocab/a", "0.5", "expected an id");
  expect_error_with("/model/vocab/a", "\"0\"", "expected an id");
  expect_error_with("/model/vocab/a", "null", "expected an id");
  expect_error_with("/model/vocab/a", "{}", "expected an id");
  expect_error_with("/model/vocab/a", "[0]", "expected an id");
  expect_error(R"({"model": {"vocab": {"a": 0, "a": 1}, "merges": []}})", "'a' occurs twice");
  expect_error(R"({"model": {"vocab": {"a": 0}, "merges": [], "vocab": {"b": 0}}})",
               "model.vocab occurs twice");
  expect_error_with("/added_tokens/0/id", "1", "has the id 1 of 'b'");
  expect_error_with("/added_tokens/0/id", "-1", "id is '-1'");
  expect_error_with("/added_tokens/0/id", "1152921504606846976", "id is '1152921504606846976'");
  expect_error_with("/added_tokens/0/content", "\"b\"", "has id 3, but the vocabulary gives it 1");
  expect_error_with("/added_tokens/1", R"({"id": 3, "content": "<t>"})", "has the id 3 of '<s>'");
  expect_error_with("/added_tokens/1", R"({"id": 4, "content": "<s>"})", "'<s>' occurs twice");
}

TEST(BadFiles, AddedTokens) {
  expect_error_with("/added_tokens", "{}", "added_tokens is object");
  expect_error_with("/added_tokens/0", "3", "added_tokens is number");
  expect_error_with("/added_tokens/0", R"({"id": 3})", "no content");
  expect_error_with("/added_tokens/0", R"({"content": "x"})", "no id");
  expect_error_with("/added_tokens/0/lstrip", "1", "lstrip is '1', expected true or false");
}

TEST(BadFiles, Merges) {
  expect_error_with("/model/merges", R"(["a c"])", "'c', which is not in the vocabulary");
  expect_error_with("/model/merges", R"(["b a"])", "'ba', which is not in the vocabulary");
  expect_error_with("/model/merges", R"(["ab"])", "found 'ab'");
  expect_error_with("/model/merges", R"(["a b b"])", "found 'a b b'");
  expect_error_with("/model/merges", R"([["a"]])", "a list of 1 tokens");
  expect_error_with("/model/merges", R"([["a", 3]])", "number");
  expect_error_with("/model/merges", R"([["a", ["b"]]])", "array");
  expect_error_with("/model/merges", R"([3])", "number");
  expect_error_with("/model/merges", R"([{"a": "b"}])", "object");
  expect_error_with("/model/merges", R"({})", "no model.merges");
  expect_error_with("/model/merges", R"(["a\nx b"])", "'a\\nx'");
}

TEST(BadFiles, ModelOptions) {
  expect_error_with("/model/dropout", "0.1", "dropout is '0.1'");
  expect_error_with("/model/continuing_subword_prefix", "\"##\"", "continuing_subword_prefix is");
  expect_error_with("/model/end_of_word_suffix", "\"</w>\"", "end_of_word_suffix is");
  expect_error_with("/model/fuse_unk", "\"yes\"", "fuse_unk is");
  json file = good();  // what says the same as null is fine
  file["model"]["dropout"] = 0.0;
  file["model"]["continuing_subword_prefix"] = "";
  EXPECT_NO_THROW((void)Tokenizer::from_json(file.dump(), "good.json"));
}

TEST(BadFiles, UnknownComponentsAreNamed) {
  for (const char* role : {"normalizer", "pre_tokenizer", "post_processor", "decoder"}) {
    const std::string pointer = std::string("/") + role;
    expect_error_with(pointer.c_str(), R"({"type": "Mystery"})",
                      std::string(role) + " 'Mystery' is not supported");
    expect_error_with(pointer.c_str(), R"({})", std::string(role) + " has no type");
    expect_error_with(pointer.c_str(), R"(["NFC"])", std::string(role) + " is array");
    expect_error_with(pointer.c_str(), R"({"type": "Sequence"})", std::string(role) + " Sequence has no ");
  }
  expect_error_with("/normalizer", R"({"type": "Sequence", "normalizers": [{"type": "Lowercase"}]})",
                    "'Lowercase'");
}

TEST(BadFiles, ComponentOptions) {
  expect_error_with("/pre_tokenizer", R"({"type": "ByteLevel"})", "has no add_prefix_space");
  expect_error_with("/pre_tokenizer", R"({"type": "Digits"})", "has no individual_digits");
  expect_error_with("/pre_tokenizer", R"({"type": "Punctuation", "behavior": "Mixed"})", "behavior is");
  expect_error_with("/pre_tokenizer", R"({"type": "Metaspace", "replacement": "ab"})",
                    "expected one character");
  expect_error_with("/pre_tokenizer",
                    R"({"type": "Metaspace", "replacement": "_", "prepend_scheme": "last"})",
                    "expected first, always or never");
  expect_error_with("/pre_tokenizer", R"({"type": "Split", "pattern": "a", "behavior": "Isolated"})",
                    "pattern is");
  expect_error_with("/pre_tokenizer",
                    R"({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"})",
                    "does not compile");
  expect_error_with("/pre_tokenizer",
                    R"({"type": "Split", "pattern": {"Regex": "[a&&[b]]"}, "behavior": "Isolated"})",
                    "an intersection of character classes");
  expect_error_with("/decoder", R"({"type": "Strip", "content": "", "start": 0, "stop": 0})",
                    "one character");
  expect_error_with("/decoder", R"({"type": "Strip", "content": "a", "start": -1, "stop": 0})",
                    "start is '-1'");
  expect_error_with("/normalizer", R"({"type": "Prepend"})", "has no prepend");
}

TEST(BadFiles, Templates) {
  const auto with = [](const char* single, const char* tokens, const std::string& part) {
    const std::string text = std::string(R"({"type": "TemplateProcessing", "single": )") + single +
                             R"(, "special_tokens": )" + tokens + "}";
    expect_error_with("/post_processor", text.c_str(), part);
  };
  const char* a = R"([{"Sequence": {"id": "A", "type_id": 0}}])";
  const char* s_a = R"([{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}])";
  with("\"<s> $A\"", "{}", "single is");
  with("[]", "{}", "expected the sequence A once");
  with(R"([{"Sequence": {"id": "A"}}, {"Sequence": {"id": "A"}}])", "{}", "expected the sequence A once");
  with(R"([{"Sequence": {"id": "B"}}])", "{}", "special tokens and the sequence A");
  with(R"([3])", "{}", "special tokens and the sequence A");
  with(s_a, "{}", "special_tokens has no '<s>'");
  with(s_a, R"({"<s>": {"ids": [-3]}})", "has the id '-3'");
  with(s_a, R"({"<s>": {"ids": [77]}})", "the id 77, which no token has");
  with(s_a, R"({"<s>": {}})", "no list of ids");
  const std::string one =
      std::string(R"({"type": "TemplateProcessing", "special_tokens": {}, "single": )") + a + "}";
  const std::string two = R"({"type": "Sequence", "processors": [)" + one + ", " + one + "]}";
  expect_error_with("/post_processor", two.c_str(), "there is a second one");
}

// Found only where it is needed, as Hugging Face does.
TEST(BadFiles, UnknownUnkToken) {
  json file = good();
  file["model"]["unk_token"] = "<unk>";
  const auto tokenizer = Tokenizer::from_json(file.dump(), "dir/bad.json");
  EXPECT_EQ(tokenizer.encode("ab"), (std::vector<std::int64_t>{2}));
  EXPECT_THROW((void)tokenizer.encode("c"), Error);
}

TEST(BadFiles, Paths) {
  const auto kind_of = [](const std::filesystem::path& path) {
    try {
      (void)Tokenizer::from_file(path);
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(path.string()), std::string::npos) << error.what();
      return error.kind();
    }
    ADD_FAILURE() << "no error";
    return ErrorKind::interrupted;
  };
  EXPECT_EQ(kind_of("/no/such/tokenizer.json"), ErrorKind::not_found);
  EXPECT_EQ(kind_of(KRAIT_MODELS_DIR), ErrorKind::invalid_argument);
}

}  // namespace
}  // namespace krait
