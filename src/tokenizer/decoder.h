// The decoders of a tokenizer.json: ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip and
// Sequence, as a chain of streaming stages: decoding all at once is pushing every token and finishing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "tokenizer/pattern.h"

namespace krait::tokenizer {

class Decoder {
 public:
  // Decodes one sequence.
  class Stream;

  // `config` is the file's "decoder"; null joins the tokens with spaces. Throws Error(invalid_argument),
  // beginning with `name`, for what is not supported.
  Decoder(const nlohmann::json& config, std::string_view name);

 private:
  struct Join {};          // a space between tokens
  struct ByteLevel {};     // from the byte alphabet to bytes, and all tokens into one text
  struct ByteFallback {};  // runs of <0x00> to <0xFF> to the text that they spell
  struct Fuse {};          // all tokens into one
  struct Metaspace {
    char32_t replacement = 0;
    bool drop_first = true;  // the replacement in the first token stands for nothing
  };
  struct Replace {
    Pattern pattern;
    std::string content;
  };
  struct Strip {
    char32_t content = 0;
    std::size_t start = 0;  // at most so many at the beginning of each token
    std::size_t stop = 0;   // and at its end
  };
  using Stage = std::variant<Join, ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip>;

  void add(const Component& component);

  std::vector<Stage> stages_;
};

// Between stages tokens may travel in fragments (the single token that Fuse makes is as long as the
// text), each of complete characters.
class Decoder::Stream {
 public:
  // `decoder` must outlive the stream.
  explicit Stream(const Decoder& decoder) : decoder_(&decoder), states_(decoder.stages_.size()) {}

  // Takes a whole token.
  void push(std::string_view token) { feed(0, token, true); }
  // Ends the sequence; the stream is ready for another then.
  void finish();
  // The text so far that has not been taken.
  [[nodiscard]] std::string take() { return std::exchange(output_, {}); }

 private:
  struct State {
    std::string held;        // the beginning of a token, or what may yet be cut off its end
    std::string bytes;       // bytes that do not form characters yet
    std::size_t tokens = 0;  // that have ended
    std::size_t stripped = 0;
    bool stripping = true;
  };

  void feed(std::size_t stage, std::string_view fragment, bool ends_token);
  void feed_byte_level(std::size_t stage, std::string_view token);
  void feed_byte_fallback(std::size_t stage, std::string_view token);
  void end_byte_run(std::size_t stage);
  void feed_metaspace(std::size_t stage, const Metaspace& config, std::string_view fragment, bool ends_token);
  void feed_strip(std::size_t stage, const Strip& config, std::string_view fragment, bool ends_token);

  const Decoder* decoder_;
  std::vector<State> states_;
  Regex::Workspace regex_;
  std::string output_;
};

}  // namespace krait::tokenizer
