#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "eval/python_text.h"
#include "krait/core/error.h"
#include "krait/eval/likelihood.h"
#include "krait/io/mapped_file.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20U;

// A JSON object in a file beside tokenizer.json; an empty one where there is no such file.
Json read_beside_tokenizer(const ModelFiles& files, const char* name) {
  if (!files.tokenizer_path) return Json::object();
  const fs::path path = files.tokenizer_path->parent_path() / name;
  if (!fs::exists(path)) return Json::object();
  Json root = Json::parse(io::read_file(path, kMaxConfigBytes), nullptr, /*allow_exceptions=*/false);
  require(root.is_object(), path.string(), ": is not a JSON object");
  return root;
}

Json config_of(const ModelFiles& files) {
  Json root = Json::parse(files.config_json, nullptr, /*allow_exceptions=*/false);
  require(root.is_object(), files.name, "/config.json: is not a JSON object");
  return root;
}

// "<s>", or the same as {"content": "<s>", ...}.
std::optional<std::string> special_token(const Json& root, const char* name) {
  if (!root.contains(name)) return std::nullopt;
  const Json& token = root[name];
  if (token.is_string()) return token.get<std::string>();
  if (token.is_object() && token.contains("content") && token["content"].is_string())
    return token["content"].get<std::string>();
  return std::nullopt;
}

// An id, or the first of several.
std::optional<std::int64_t> id_of(const Json& root, const char* name) {
  if (!root.contains(name)) return std::nullopt;
  const Json& id = root[name].is_array() && !root[name].empty() ? root[name][0] : root[name];
  return id.is_number_integer() ? std::optional(id.get<std::int64_t>()) : std::nullopt;
}

}  // namespace

std::int64_t prefix_token_of(const ModelFiles& files, const Tokenizer& tokenizer) {
  const Json tokenizer_config = read_beside_tokenizer(files, "tokenizer_config.json");
  const Json special_tokens = read_beside_tokenizer(files, "special_tokens_map.json");
  for (const char* name : {"bos_token", "eos_token"})
    for (const Json* root : {&tokenizer_config, &special_tokens})
      if (const auto token = special_token(*root, name))
        if (const auto id = tokenizer.token_to_id(*token)) return *id;
  const Json config = config_of(files);
  for (const char* name : {"bos_token_id", "eos_token_id"})
    if (const auto id = id_of(config, name)) return *id;
  if (const auto id = tokenizer.token_to_id("<|endoftext|>")) return *id;
  fail(ErrorKind::not_found, files.name,
       ": neither tokenizer_config.json nor config.json names a token of the beginning or end of a text, "
       "which "
       "stands for an empty context");
}

std::int64_t max_length_of(const ModelFiles& files) {
  const Json config = config_of(files);
  for (const char* name : {"n_positions", "max_position_embeddings", "n_ctx"})
    if (const auto length = id_of(config, name)) {
      require(*length >= 1, files.name, "/config.json: ", name, " is ", *length, ", expected at least 1");
      return *length;
    }
  // Tokenizers without a limit say 1e30, which is no 64-bit integer.
  const Json tokenizer_config = read_beside_tokenizer(files, "tokenizer_config.json");
  if (const auto found = tokenizer_config.find("model_max_length");
      found != tokenizer_config.end() && found->is_number_integer() && found->get<double>() >= 1.0)
    return found->get<std::int64_t>();
  constexpr std::int64_t kNoLimit = 2048;
  return kNoLimit;
}

PairEncoder::PairEncoder(const Tokenizer& tokenizer, std::int64_t prefix_token)
    : tokenizer_(tokenizer),
      prefix_token_(prefix_token),
      prefix_text_(tokenizer.decode(std::span(&prefix_token, 1))) {}

std::vector<std::int64_t> PairEncoder::encode_text(std::string_view text) const {
  return tokenizer_.encode(text, {.add_special_tokens = !text.starts_with(prefix_text_)});
}

Continuation PairEncoder::encode(std::string_view context, std::string_view continuation) {
  const std::string_view stripped = strip_right(context);
  const std::string text = std::string(context.substr(stripped.size())).append(continuation);
  if (stripped != last_context_) {
    last_context_ = stripped;
    last_ids_ = encode_text(stripped);
  }
  Continuation pair;
  if (stripped.empty()) {
    pair = {.context = {prefix_token_}, .continuation = tokenizer_.encode(text)};
    if (pair.continuation.size() > 1 && pair.continuation.front() == prefix_token_)
      pair.continuation.erase(pair.continuation.begin());
  } else {
    pair.context = last_ids_;
    const std::vector<std::int64_t> whole = encode_text(std::string(stripped) + text);
    const auto begin = std::min(pair.context.size(), whole.size());
    pair.continuation.assign(whole.begin() + static_cast<std::ptrdiff_t>(begin), whole.end());
  }
  require(!pair.continuation.empty(), "a continuation has no tokens of its own, expected at least 1");
  return pair;
}

}  // namespace krait
