// A tokenizer.json of any bytes either loads or is refused with an Error. One that loads encodes and
// decodes any text, and decodes it piecewise to the same.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "krait/core/error.h"
#include "krait/tokenizer/tokenizer.h"

namespace {

constexpr std::string_view kTexts[] = {
    "",
    " ",
    "aab b  ab'll 1234,\n\n\tab",
    "\xE2\x96\x81"
    "a<s>b</s> \xC3\xA9 e\xCC\x81 \xE5\xAD\x97\xF0\x9F\x98\x80",
    "\xFF\xC3(\xE2\x82",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
};

void check(bool holds) {
  if (!holds) std::abort();
}

void round_trip(const krait::Tokenizer& tokenizer, std::string_view text) {
  const auto ids = tokenizer.encode(text, {.add_special_tokens = true});
  for (const bool skip_special : {false, true}) {
    krait::StreamDecoder stream(tokenizer, skip_special);
    std::string streamed;
    for (const std::int64_t id : ids) {
      check(id >= 0 && id < tokenizer.vocab_size());
      check(tokenizer.token_to_id(tokenizer.id_to_token(id)) == id);
      streamed += stream.push(id);
    }
    streamed += stream.finish();
    check(streamed == tokenizer.decode(ids, skip_special));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view json(reinterpret_cast<const char*>(data), size);
  try {
    const auto tokenizer = krait::Tokenizer::from_json(json, "fuzz.json");
    for (const std::string_view text : kTexts) round_trip(tokenizer, text);
  } catch (const krait::Error& error) {
    check(std::string_view(error.what()).find('\n') == std::string_view::npos);
  }
  return 0;
}
