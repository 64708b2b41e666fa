// Every component in small tokenizers, against ids and texts that Hugging Face's tokenizers gives
// (components.json: models, and for each case the rest of a tokenizer.json and its results).
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "krait/tokenizer/tokenizer.h"

namespace krait {
namespace {

using Ids = std::vector<std::int64_t>;

std::string streamed(const Tokenizer& tokenizer, const Ids& ids, bool skip_special) {
  StreamDecoder stream(tokenizer, skip_special);
  std::string text;
  for (const auto id : ids) text += stream.push(id);
  return text + stream.finish();
}

TEST(Components, AgreeWithHuggingFace) {
  std::ifstream in(KRAIT_SOURCE_DIR "/tests/tokenizer/components.json");
  const nlohmann::json file = nlohmann::json::parse(in);
  ASSERT_GE(file.at("cases").size(), 79U);
  for (const auto& c : file.at("cases")) {
    nlohmann::json config = c.at("config");
    config["model"] = file.at("models").at(c.at("model").get<std::string>());
    const auto tokenizer = Tokenizer::from_json(config.dump(), "tokenizer.json");
    for (const auto& result : c.at("results")) {
      SCOPED_TRACE(c.at("name").get<std::string>() + ": " + result.dump());
      const auto ids = result.at("ids").get<Ids>();
      if (result.contains("text")) {
        const auto text = result.at("text").get<std::string>();
        EXPECT_EQ(tokenizer.encode(text), ids);
        EXPECT_EQ(tokenizer.encode(text, {.add_special_tokens = true}), result.at("special_ids").get<Ids>());
      }
      EXPECT_EQ(tokenizer.decode(ids), result.at("decoded").get<std::string>());
      EXPECT_EQ(tokenizer.decode(ids, true), result.at("skipped").get<std::string>());
      EXPECT_EQ(streamed(tokenizer, ids, false), result.at("decoded").get<std::string>());
      EXPECT_EQ(streamed(tokenizer, ids, true), result.at("skipped").get<std::string>());
    }
  }
}

}  // namespace
}  // namespace krait
