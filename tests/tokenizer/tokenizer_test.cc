#include "krait/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "krait/core/error.h"
#include "krait/core/random.h"
#include "tokenizer/random_text.h"
#include "tokenizer/unicode.h"

namespace krait {
namespace {

using Ids = std::vector<std::int64_t>;

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

const Tokenizer& gpt_neox() {
  static const Tokenizer tokenizer = Tokenizer::from_file(KRAIT_MODELS_DIR "/gpt-neox/tokenizer.json");
  return tokenizer;
}

const Tokenizer& shakespeare() {
  static const Tokenizer tokenizer = Tokenizer::from_file(KRAIT_MODELS_DIR "/shakespeare/tokenizer.json");
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

TEST(Tokenizer, Vocabulary) {
  EXPECT_EQ(gpt_neox().vocab_size(), 50277);
  EXPECT_EQ(gpt_neox().token_to_id("<|endoftext|>"), 0);
  EXPECT_EQ(gpt_neox().token_to_id("\u0120the"), 253);
  EXPECT_EQ(gpt_neox().token_to_id("  "), 50276);
  EXPECT_EQ(gpt_neox().token_to_id("no such token"), std::nullopt);
  EXPECT_EQ(gpt_neox().id_to_token(253), "\u0120the");
  EXPECT_EQ(gpt_neox().id_to_token(50276), "  ");
  EXPECT_TRUE(gpt_neox().is_special(0));
  EXPECT_FALSE(gpt_neox().is_special(253));
  EXPECT_FALSE(gpt_neox().is_special(50276));
  EXPECT_FALSE(gpt_neox().is_special(-1));
}

TEST(Tokenizer, UnknownIdsAreErrorsThatNameThem) {
  for (const std::int64_t id : {std::int64_t{50277}, std::int64_t{-1}, std::int64_t{1} << 60}) {
    const Ids ids = {253, id};
    try {
      (void)gpt_neox().decode(ids);
      ADD_FAILURE() << "no error for " << id;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(std::to_string(id)), std::string::npos) << error.what();
    }
    EXPECT_THROW((void)gpt_neox().id_to_token(id), Error);
  }
}

TEST(Tokenizer, RoundTripOfShakespeare) {
  const std::string text = read_file(KRAIT_SOURCE_DIR "/tests/data/tinyshakespeare.txt");
  ASSERT_GT(text.size(), 1'000'000U);
  for (const Tokenizer* tokenizer : {&gpt_neox(), &shakespeare()}) {
    const Ids ids = tokenizer->encode(text);
    EXPECT_LT(ids.size(), text.size() / 2);
    EXPECT_EQ(tokenizer->decode(ids), text);
  }
}

TEST(Tokenizer, RoundTripOfRandomText) {
  Rng rng(1);
  for (int round = 0; round < 3000; ++round) {
    const std::string text = random_text(rng, static_cast<int>(rng.next_u32() % 40));
    SCOPED_TRACE(text);
    EXPECT_EQ(shakespeare().decode(shakespeare().encode(text)), text);
    // This file normalizes: its text is the normal form, and has the same ids.
    const Ids ids = gpt_neox().encode(text);
    const std::string normal = tokenizer::to_nfc(text);
    EXPECT_EQ(gpt_neox().decode(ids), normal);
    EXPECT_EQ(gpt_neox().encode(normal), ids);
  }
}

TEST(Tokenizer, AnyBytesAreText) {
  const auto with_replacement = [](const char* text) { return gpt_neox().decode(gpt_neox().encode(text)); };
  EXPECT_EQ(with_replacement("a\xFFz"), "a\uFFFDz");
  EXPECT_EQ(with_replacement("\xE2\x82"), "\uFFFD");
  EXPECT_EQ(with_replacement("\xE2\x82\xE2\x82\xAC"), "\uFFFD\u20AC");
  EXPECT_EQ(with_replacement("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");  // a surrogate
  Rng rng(2);
  for (int round = 0; round < 500; ++round) {
    std::string bytes;
    for (int i = 0; i < 50; ++i) bytes.push_back(static_cast<char>(rng.next_u32() & 0xFFU));
    std::string valid;
    tokenizer::append_valid_utf8(valid, bytes, true);
    EXPECT_EQ(shakespeare().decode(shakespeare().encode(bytes)), valid);
  }
}

// Text may contain zero bytes.
TEST(Tokenizer, ZeroBytes) {
  const std::string text("a\0b\0", 4);
  EXPECT_EQ(gpt_neox().decode(gpt_neox().encode(text)), text);
}

TEST(StreamDecoder, EqualsDecodeAndNeverCutsACharacter) {
  Rng rng(3);
  for (int round = 0; round < 2000; ++round) {
    // Random ids give bytes that are no text; encoded text gives characters in several tokens.
    Ids ids;
    if (round % 2 == 0) {
      ids = shakespeare().encode(random_text(rng, 20));
    } else {
      for (int i = 0; i < 30; ++i) ids.push_back(rng.next_u32() % shakespeare().vocab_size());
    }
    for (const bool skip_special : {false, true}) {
      StreamDecoder stream(shakespeare(), skip_special);
      std::string text;
      for (const auto id : ids) {
        const std::string piece = stream.push(id);
        EXPECT_TRUE(tokenizer::is_valid_utf8(piece));
        text += piece;
      }
      text += stream.finish();
      EXPECT_EQ(text, shakespeare().decode(ids, skip_special));
      EXPECT_EQ(stream.finish(), "") << "finish left something behind";
    }
  }
}

TEST(StreamDecoder, HoldsWhatItHeldAfterAnUnknownId) {
  const Ids euro = shakespeare().encode("\u20AC");
  ASSERT_EQ(euro.size(), 3U);
  StreamDecoder stream(shakespeare());
  EXPECT_EQ(stream.push(euro[0]), "");
  EXPECT_EQ(stream.push(euro[1]), "");
  EXPECT_THROW((void)stream.push(1 << 20), Error);
  EXPECT_EQ(stream.push(euro[2]), "\u20AC");
}

TEST(StreamDecoder, OutlivesTheTokenizerObject) {
  auto tokenizer = std::make_unique<Tokenizer>(shakespeare());
  StreamDecoder stream(*tokenizer);
  tokenizer.reset();
  EXPECT_EQ(stream.push(shakespeare().encode("a").at(0)), "a");
}

// One piece of a quarter of a million symbols: nothing may be quadratic, which would take minutes.
TEST(Tokenizer, LongRuns) {
  for (const char* unit :
       {"a", " ", "\n", "ab", "1", "!", "'", "\u00e9", "\u0301", "\u5b57", "a\u0301", "\u0301\u0323"}) {
    SCOPED_TRACE(unit);
    std::string text;
    while (text.size() < (std::size_t{1} << 18)) text += unit;
    const Ids ids = gpt_neox().encode(text);
    EXPECT_EQ(gpt_neox().decode(ids), tokenizer::to_nfc(text));
  }
}

TEST(Tokenizer, ThreadsShareOne) {
  Rng rng(4);
  std::vector<std::string> texts;
  std::vector<Ids> expected;
  for (int i = 0; i < 200; ++i) {
    texts.push_back(random_text(rng, 50));
    expected.push_back(gpt_neox().encode(texts.back()));
  }
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t i = 0; i < texts.size(); ++i) {
        const std::size_t at = (i * 7 + t * 31) % texts.size();
        if (gpt_neox().encode(texts[at]) != expected[at]) ++wrong[t];
        if (gpt_neox().decode(expected[at]) != tokenizer::to_nfc(texts[at])) ++wrong[t];
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

}  // namespace
}  // namespace krait
