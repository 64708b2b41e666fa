// Text for property tests: random characters from many scripts, with what tokenizers treat specially.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "krait/core/random.h"

namespace krait {

inline std::string random_text(Rng& rng, int characters) {
  static constexpr std::array<std::string_view, 52> kParts = {
      "a",      "b",      "Z",      "e",      " ",          " ",          "  ",     "\n",      "\r\n",
      "\t",     "0",      "7",      "42",     "'s",         "'ll",        "'S",     "'",       "'re",
      "'v",     ".",      "!?",     "_",      "-",          "<s>",        "$",      "\u00e9",  "\u00df",
      "\u0416", "\u0439", "\u03a9", "\u05d0", "\u0663",     "\u0905",     "\u093f", "e\u0301", "\u0301",
      "\u0323", "\uac00", "\u1100", "\u1161", "\u5b57",     "\u3042",     "\u3000", "\u00a0",  "\u2028",
      "\u180e", "\u200d", "\u00b2", "\u2160", "\U0001f600", "\U0001d7d8", "\ufffd"};
  std::string text;
  for (int i = 0; i < characters; ++i) text += kParts[rng.next_u32() % kParts.size()];
  return text;
}

}  // namespace krait
