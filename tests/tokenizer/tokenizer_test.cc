#include "krait/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace krait {
namespace {

using Ids = std::vector<std::int64_t>;

const Tokenizer& gpt_neox() {
  static const Tokenizer tokenizer = Tokenizer::from_file(KRAIT_MODELS_DIR "/gpt-neox/tokenizer.json");
  return tokenizer;
}

TEST(Tokenizer, GoldenCases) {
  std::ifstream in(KRAIT_GOLDEN_DIR "/tokenizer/cases.json");
  const nlohmann::json cases = nlohmann::json::parse(in);
  ASSERT_EQ(cases.size(), 100U);
  for (const auto& c : cases) {
    const auto text = c.at("text").get<std::string>();
    SCOPED_TRACE(c.dump().substr(0, 500));
    const Ids ids = gpt_neox().encode(text);
    EXPECT_EQ(ids, c.at("ids").get<Ids>());
    EXPECT_EQ(gpt_neox().decode(ids), c.at("decoded").get<std::string>());
    EXPECT_EQ(gpt_neox().decode(ids, true), c.at("decoded_skip_special").get<std::string>());
  }
}

}  // namespace
}  // namespace krait
