#include "tokenizer/decoder.h"

#include <optional>
#include <utility>

#include "krait/core/error.h"
#include "tokenizer/byte_alphabet.h"

namespace krait::tokenizer {
namespace {

std::optional<unsigned> hex_digit(char c) {
  if (c >= '0' && c <= '9') return static_cast<unsigned>(c - '0');
  if (c >= 'a' && c <= 'f') return static_cast<unsigned>(c - 'a') + 10;
  if (c >= 'A' && c <= 'F') return static_cast<unsigned>(c - 'A') + 10;
  return std::nullopt;
}

// The byte of "<0x41>".
std::optional<char> fallback_byte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) return std::nullopt;
  const auto high = hex_digit(token[3]);
  const auto low = hex_digit(token[4]);
  if (!high || !low) return std::nullopt;
  return static_cast<char>(static_cast<unsigned char>(*high * 16 + *low));
}

}  // namespace

Decoder::Decoder(const nlohmann::json& config, std::string_view name) {
  if (config.is_null()) {
    stages_.emplace_back(Join{});
  } else {
    add(Component(config, concat(name, ": decoder")));
  }
}

void Decoder::add(const Component& component) {
  const std::string& type = component.type();
  if (type == "ByteLevel") {
    stages_.emplace_back(ByteLevel{});
  } else if (type == "ByteFallback") {
    stages_.emplace_back(ByteFallback{});
  } else if (type == "Fuse") {
    stages_.emplace_back(Fuse{});
  } else if (type == "Metaspace") {
    const bool may_prepend = component.flag("add_prefix_space", true);
    const std::string scheme = component.text("prepend_scheme", may_prepend ? "always" : "never");
    stages_.emplace_back(Metaspace{component.character("replacement"), scheme != "never"});
  } else if (type == "Replace") {
    stages_.emplace_back(Replace{Pattern(component), component.text("content")});
  } else if (type == "Strip") {
    stages_.emplace_back(
        Strip{component.character("content"), component.count("start"), component.count("stop")});
  } else if (type == "Sequence") {
    for (const Component& part : component.parts("decoders")) add(part);
  } else {
    component.refuse_type("ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip or Sequence");
  }
}

void Decoder::Stream::feed(std::size_t stage, std::string_view fragment, bool ends_token) {
  if (stage == states_.size()) {
    output_.append(fragment);
    return;
  }
  const Stage& config = decoder_->stages_[stage];
  State& state = states_[stage];
  if (std::holds_alternative<Fuse>(config)) return feed(stage + 1, fragment, false);
  if (const auto* metaspace = std::get_if<Metaspace>(&config)) {
    return feed_metaspace(stage, *metaspace, fragment, ends_token);
  }
  if (const auto* strip = std::get_if<Strip>(&config)) return feed_strip(stage, *strip, fragment, ends_token);

  // The others look at whole tokens.
  if (!ends_token) {
    state.held.append(fragment);
    return;
  }
  std::string token = std::exchange(state.held, {});
  token.append(fragment);
  if (std::holds_alternative<ByteLevel>(config)) {
    feed_byte_level(stage, token);
  } else if (std::holds_alternative<ByteFallback>(config)) {
    feed_byte_fallback(stage, token);
  } else if (const auto* replace = std::get_if<Replace>(&config)) {
    feed(stage + 1, replace->pattern.replace_all(token, replace->content, regex_), true);
  } else {  // Join
    if (state.tokens++ > 0) feed(stage + 1, " ", false);
    feed(stage + 1, token, false);
  }
}

void Decoder::Stream::feed_byte_level(std::size_t stage, std::string_view token) {
  State& state = states_[stage];
  append_bytes_of(state.bytes, token);
  std::string complete;
  state.bytes.erase(0, append_valid_utf8(complete, state.bytes, false));
  feed(stage + 1, complete, false);
}

// A run of byte tokens is text only where all of it is valid, so it must be complete before any of it
// can be shown.
void Decoder::Stream::feed_byte_fallback(std::size_t stage, std::string_view token) {
  if (const auto byte = fallback_byte(token)) {
    states_[stage].bytes.push_back(*byte);
    return;
  }
  end_byte_run(stage);
  feed(stage + 1, token, true);
}

void Decoder::Stream::end_byte_run(std::size_t stage) {
  const std::string bytes = std::exchange(states_[stage].bytes, {});
  if (bytes.empty()) return;
  if (is_valid_utf8(bytes)) return feed(stage + 1, bytes, true);
  for (std::size_t i = 0; i < bytes.size(); ++i) feed(stage + 1, kReplacementCharacter, true);
}

void Decoder::Stream::feed_metaspace(std::size_t stage, const Metaspace& config, std::string_view fragment,
                                     bool ends_token) {
  State& state = states_[stage];
  std::string out;
  for (std::size_t i = 0; i < fragment.size();) {
    const CodePoint c = code_point_at(fragment, i);
    if (c.value != config.replacement) {
      out.append(fragment.substr(i, c.length));
    } else if (state.tokens > 0 || !config.drop_first) {
      out.push_back(' ');
    }
    i += c.length;
  }
  if (ends_token) ++state.tokens;
  feed(stage + 1, out, ends_token);
}

void Decoder::Stream::feed_strip(std::size_t stage, const Strip& config, std::string_view fragment,
                                 bool ends_token) {
  State& state = states_[stage];
  while (state.stripping && state.stripped < config.start && !fragment.empty()) {
    const CodePoint c = code_point_at(fragment, 0);
    if (c.value != config.content) {
      state.stripping = false;
    } else {
      fragment.remove_prefix(c.length);
      ++state.stripped;
    }
  }
  if (state.stripped == config.start) state.stripping = false;

  // Hold back what would be cut off if the token ended here.
  std::string rest = std::exchange(state.held, {});
  rest.append(fragment);
  std::size_t keep = rest.size();
  for (std::size_t cut = 0; cut < config.stop && keep > 0; ++cut) {
    const CodePoint c = code_point_before(rest, keep);
    if (c.value != config.content) break;
    keep -= c.length;
  }
  if (ends_token) {
    state.stripping = true;
    state.stripped = 0;
  } else {
    state.held = rest.substr(keep);
  }
  feed(stage + 1, std::string_view(rest).substr(0, keep), ends_token);
}

void Decoder::Stream::finish() {
  for (std::size_t stage = 0; stage < states_.size(); ++stage) {
    const Stage& config = decoder_->stages_[stage];
    if (std::holds_alternative<ByteLevel>(config)) {
      std::string rest;
      append_valid_utf8(rest, std::exchange(states_[stage].bytes, {}), true);
      feed(stage + 1, rest, true);
    } else if (std::holds_alternative<ByteFallback>(config)) {
      end_byte_run(stage);
    } else if (std::holds_alternative<Fuse>(config) || std::holds_alternative<Join>(config)) {
      feed(stage + 1, "", true);
    }
    states_[stage] = {};
  }
}

}  // namespace krait::tokenizer
