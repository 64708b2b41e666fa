// Text to token ids and back, by the rules of a Hugging Face tokenizer.json: byte-level and
// byte-fallback BPE (Sennrich, Haddow and Birch, "Neural machine translation of rare words with
// subword units", ACL 2016), giving the ids and the text that Hugging Face's `tokenizers` gives.
// docs/tokenizer.md lists the components that are understood; any other is an error that names it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace krait {

struct EncodeOptions {
  // Adds what the file's TemplateProcessing adds, such as "<s>" in front. Where the file has no
  // template nothing is added.
  bool add_special_tokens = false;
};

// A loaded tokenizer.json. Copies share one immutable vocabulary, and every const member function may
// be called from several threads at once.
class Tokenizer {
 public:
  // Throws Error(not_found) or Error(io) where the file cannot be read, and Error(invalid_argument),
  // naming the file and what was found in it, where it is not a tokenizer that is understood.
  [[nodiscard]] static Tokenizer from_file(const std::filesystem::path& path);
  // The same from the content of such a file; `name` stands for the file in messages.
  [[nodiscard]] static Tokenizer from_json(std::string_view json, std::string_view name);

  // The ids of `text`. Added and special tokens that are spelled out in the text become their ids.
  // Each invalid UTF-8 sequence counts as one U+FFFD. The file's truncation and padding are not applied.
  // Throws Error(invalid_argument) where a regular expression of the file exceeds its match limit.
  [[nodiscard]] std::vector<std::int64_t> encode(std::string_view text, EncodeOptions options = {}) const;

  // The text of `ids`, always valid UTF-8: bytes that do not form a character become U+FFFD. With
  // `skip_special` special tokens leave no trace. Throws Error(invalid_argument) at an unknown id.
  [[nodiscard]] std::string decode(std::span<const std::int64_t> ids, bool skip_special = false) const;

  // The largest id, added tokens included, plus one.
  [[nodiscard]] std::int64_t vocab_size() const;
  [[nodiscard]] std::optional<std::int64_t> token_to_id(std::string_view token) const;
  // The token as the file spells it (a byte-level token in the byte alphabet: "\u0120the"). The view
  // lives as long as a copy of this tokenizer does. Throws Error(invalid_argument) at an unknown id.
  [[nodiscard]] std::string_view id_to_token(std::int64_t id) const;
  [[nodiscard]] bool is_special(std::int64_t id) const;
  // True where a text may be cut before ASCII white space that follows another character, and the ids of the
  // parts, one after the other, are those of the text: so with byte-level tokenizers that split as GPT-2's
  // does. False does not say that they are not.
  [[nodiscard]] bool may_cut_before_space() const;

 private:
  friend class StreamDecoder;
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

  std::shared_ptr<const Impl> impl_;
};

// Decodes id by id. The pieces that push returns consist of complete characters, and they and
// finish's, concatenated, equal Tokenizer::decode of all ids.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special = false);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;

  // The text that `id` completes, which may be empty. Throws Error(invalid_argument) at an unknown id
  // and then holds what it held before.
  [[nodiscard]] std::string push(std::int64_t id);
  // The text still held back, with U+FFFD for an incomplete character. Ready for a new sequence then.
  [[nodiscard]] std::string finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace krait
