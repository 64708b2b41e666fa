#include "tokenizer/unicode.h"

#include <gtest/gtest.h>
#include <utf8proc.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "krait/core/random.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/random_text.h"

namespace krait::tokenizer {
namespace {

std::string utf8(char32_t c) {
  std::string text;
  append_utf8(text, c);
  return text;
}

TEST(Utf8, EveryCodePointRoundTrips) {
  for (char32_t c = 0; c < 0x110000; ++c) {
    const std::string text = utf8(c);
    const bool surrogate = c >= 0xD800 && c < 0xE000;
    ASSERT_EQ(is_valid_utf8(text), !surrogate) << std::hex << static_cast<unsigned>(c);
    if (surrogate) continue;
    ASSERT_EQ(code_point_at(text, 0).value, c);
    ASSERT_EQ(code_point_at(text, 0).length, text.size());
    ASSERT_EQ(code_point_before("x" + text, text.size() + 1).value, c);
  }
}

// The examples of the Unicode Standard, section 3.9, tables 3-8 to 3-11.
TEST(Utf8, OneReplacementForEachMaximalSubpart) {
  const auto repaired = [](std::string_view bytes) {
    std::string out;
    append_valid_utf8(out, bytes, true);
    return out;
  };
  const auto times = [](int n) {
    std::string out;
    for (int i = 0; i < n; ++i) out += kReplacementCharacter;
    return out;
  };
  EXPECT_EQ(repaired("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82"
                     "A"),
            times(8) + "A");
  EXPECT_EQ(repaired("\xED\xA0\x80\xED\xBF\xBF\xED\xAF"
                     "A"),
            times(8) + "A");
  EXPECT_EQ(repaired("\xF4\x91\x92\x93\xFF"
                     "A\x80\xBF"
                     "B"),
            times(5) + "A" + times(2) + "B");
  EXPECT_EQ(repaired("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF"
                     "A"),
            times(4) + "A");
  EXPECT_EQ(repaired("\xF0\x9F\x98"), times(1));
}

TEST(Utf8, IncompleteCharactersWait) {
  std::string out;
  EXPECT_EQ(append_valid_utf8(out, "a\xF0\x9F\x98", false), 1U);
  EXPECT_EQ(out, "a");
  EXPECT_EQ(append_valid_utf8(out, "\xF0\x9F\x98\x80z", false), 5U);
  EXPECT_EQ(out, "a\U0001f600z");
}

TEST(Utf8, AsciiPrefix) {
  for (std::size_t length = 0; length < 40; ++length) {
    EXPECT_EQ(ascii_prefix(std::string(length, 'x')), length);
    EXPECT_EQ(ascii_prefix(std::string(length, 'x') + "\u00e9" + std::string(20, 'x')), length);
  }
}

TEST(Classes, Samples) {
  for (const char32_t c : {U'a', U'Z', U'\u00e9', U'\u00aa', U'\u5b57', U'\u0905', U'\U0001d400'}) {
    EXPECT_EQ(class_of(c), CharClass::letter) << static_cast<unsigned>(c);
  }
  for (const char32_t c : {U'0', U'9', U'\u0663', U'\u00b2', U'\u00bd', U'\u2160', U'\U0001d7d8'}) {
    EXPECT_EQ(class_of(c), CharClass::number) << static_cast<unsigned>(c);
  }
  for (const char32_t c : {U' ', U'\t', U'\r', U'\u0085', U'\u00a0', U'\u2003', U'\u2028', U'\u3000'}) {
    EXPECT_EQ(class_of(c), CharClass::space) << static_cast<unsigned>(c);
  }
  for (const char32_t c : {U'!', U'\0', U'\x1f', U'\u0301', U'\u180e', U'\u200b', U'\ufeff', U'\U0001f600'}) {
    EXPECT_EQ(class_of(c), CharClass::other) << static_cast<unsigned>(c);
  }
  EXPECT_TRUE(is_punctuation('$') && is_punctuation('_') && is_punctuation(U'\u00ab') &&
              is_punctuation(U'\u3002'));
  EXPECT_FALSE(is_punctuation('a') || is_punctuation(' ') || is_punctuation(U'\u20ac') ||
               is_punctuation(0x7F));
  EXPECT_TRUE(is_word('_') && is_word(U'\u0301') && is_word('7') && is_word(U'\u24b6') && is_word(U'\u200d'));
  EXPECT_FALSE(is_word(' ') || is_word('-') || is_word(U'\u00b2'));
}

// The stretches that to_nfc leaves alone must not matter: against utf8proc on the whole text.
TEST(Nfc, EqualsNormalizationOfTheWhole) {
  const auto whole = [](const std::string& text) {
    utf8proc_uint8_t* mapped = nullptr;
    const auto length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                     static_cast<utf8proc_ssize_t>(text.size()), &mapped,
                                     static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(mapped, &std::free);
    return std::string(reinterpret_cast<const char*>(mapped), static_cast<std::size_t>(length));
  };
  for (char32_t c = 0; c < 0x2FA20; ++c) {  // normalization ends there
    if (c == 0xD800) c = 0xE000;
    if (c == 0x20000) c = 0x2F800;
    for (const char* before : {"a", "\uac00", "\u09c7"}) {
      const std::string text = before + utf8(c) + "\u0301x";
      ASSERT_EQ(to_nfc(text), whole(text)) << std::hex << static_cast<unsigned>(c);
    }
  }
  Rng rng(5);
  for (int round = 0; round < 5000; ++round) {
    const std::string text = random_text(rng, 30);
    EXPECT_EQ(to_nfc(text), whole(text)) << text;
  }
}

TEST(ByteAlphabet, IsABijection) {
  for (unsigned byte = 0; byte < 256; ++byte) {
    const char32_t c = character_of_byte(static_cast<unsigned char>(byte));
    EXPECT_EQ(byte_of_character(c), static_cast<unsigned char>(byte));
    EXPECT_TRUE(class_of(c) != CharClass::space) << byte;
  }
  EXPECT_EQ(character_of_byte(' '), U'\u0120');
  EXPECT_EQ(character_of_byte('\n'), U'\u010a');
  EXPECT_EQ(character_of_byte(0xAD), U'\u0143');
  EXPECT_EQ(byte_of_character(U' '), std::nullopt);
  EXPECT_EQ(byte_of_character(U'\u0144'), std::nullopt);
  std::string out;
  append_bytes_of(out, "\u0120the");
  append_bytes_of(out, "two words");  // holds a space, which is not in the alphabet
  EXPECT_EQ(out, " thetwo words");
}

TEST(Messages, AreOneLine) {
  EXPECT_EQ(in_quotes("a\n\x01\xFF\u00e9"), "'a\\n\\x01\\xff\u00e9'");
  EXPECT_LT(in_quotes(std::string(1000, 'x')).size(), 100U);
}

}  // namespace
}  // namespace krait::tokenizer
