#include "krait/tokenizer/tokenizer.h"

#include <algorithm>
#include <fstream>
#include <unordered_map>

#include "krait/core/error.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/decoder.h"
#include "tokenizer/json_file.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/pre_tokenizer.h"
#include "tokenizer/template.h"
#include "tokenizer/text_files.h"
#include "tokenizer/workspace_pool.h"

namespace krait {

using namespace tokenizer;

namespace {

using nlohmann::json;

// What encoding one text needs.
struct EncodeWorkspace {
  Bpe::Workspace bpe;
  PreTokenizer::Workspace pieces;
  std::vector<AddedTokenFinder::Section> sections;
  std::vector<AddedTokenFinder::Section> normalized_sections;
  std::string normalized;
};

// Workspaces that a text beyond this size has blown up are not kept.
constexpr std::size_t kLargeText = std::size_t{16} << 20;

const json& member(const json& object, const char* name) {
  static const json kNull;
  const auto at = object.find(name);
  return at == object.end() ? kNull : *at;
}

BpeOptions read_bpe_options(const json& rest, std::string_view name) {
  const Fields model(rest.at("model"), concat(name, ": model"));
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model.text(affix, "").empty()) model.refuse(affix, "null: it is not supported");
  }
  const json& dropout = member(rest.at("model"), "dropout");
  if (!dropout.is_null() && dropout != 0) model.refuse("dropout", "null: it is not supported");
  BpeOptions options;
  if (model.has("unk_token")) options.unk_token = model.text("unk_token");
  options.fuse_unk = model.flag("fuse_unk", false);
  options.byte_fallback = model.flag("byte_fallback", false);
  options.ignore_merges = model.flag("ignore_merges", false);
  return options;
}

AddedToken read_added_token(const json& value, std::string_view name) {
  const Fields fields(value, concat(name, ": added_tokens"));
  AddedToken token;
  token.content = fields.text("content");
  if (!fields.field("id").is_number_unsigned() ||
      fields.field("id").get<std::uint64_t>() >= static_cast<std::uint64_t>(kMaxVocabulary)) {
    fields.refuse("id", concat("one from 0 to ", kMaxVocabulary - 1));
  }
  token.id = fields.field("id").get<TokenId>();
  token.single_word = fields.flag("single_word", false);
  token.lstrip = fields.flag("lstrip", false);
  token.rstrip = fields.flag("rstrip", false);
  token.special = fields.flag("special", false);
  token.normalized = fields.flag("normalized", !token.special);
  return token;
}

bool has_all_byte_characters(const Vocabulary& vocabulary) {
  for (unsigned byte = 0; byte < 256; ++byte) {
    std::string character;
    append_utf8(character, character_of_byte(static_cast<unsigned char>(byte)));
    if (!vocabulary.find(character)) return false;
  }
  return true;
}

// Where the last step of pre-tokenization spells bytes, the model reads the bytes themselves, unless it
// would have to replace a spelled byte that it does not know.
Bpe make_bpe(JsonFile& file, PreTokenizer& pre_tokenizer, std::string_view name) {
  BpeOptions options = read_bpe_options(file.rest, name);
  const bool drops_unknown = !options.unk_token && !options.byte_fallback;
  if (pre_tokenizer.ends_in_byte_level() && (drops_unknown || has_all_byte_characters(file.vocabulary))) {
    options.byte_level = true;
    pre_tokenizer.leave_bytes();
  }
  return Bpe(std::move(file.vocabulary), file.merges, std::move(options), name);
}

}  // namespace

struct Tokenizer::Impl {
  Impl(JsonFile file, std::string file_name);
  void add_token(AddedToken token);
  void encode_section(std::string_view text, bool at_start, EncodeWorkspace& workspace,
                      std::vector<std::int64_t>& ids) const;
  [[nodiscard]] bool knows(std::int64_t id) const;
  [[nodiscard]] std::string_view token(std::int64_t id) const;
  [[nodiscard]] bool is_special(std::int64_t id) const;
  [[nodiscard]] bool may_cut_before_space() const;

  std::string name;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  Decoder decoder;
  Template surroundings;
  // The tokens keep their places: views and pointers lead to them.
  std::vector<std::unique_ptr<const AddedToken>> added;
  std::unordered_map<std::string_view, const AddedToken*> added_by_content;
  std::unordered_map<std::int64_t, const AddedToken*> added_by_id;
  AddedTokenFinder raw_finder;
  AddedTokenFinder normalized_finder;
  std::int64_t vocab_size = 0;
  mutable WorkspacePool<EncodeWorkspace> workspaces;
};

Tokenizer::Impl::Impl(JsonFile file, std::string file_name)
    : name(std::move(file_name)),
      normalizer(member(file.rest, "normalizer"), name),
      pre_tokenizer(member(file.rest, "pre_tokenizer"), name),
      bpe(make_bpe(file, pre_tokenizer, name)),
      decoder(member(file.rest, "decoder"), name),
      surroundings(read_template(member(file.rest, "post_processor"), name)),
      vocab_size(bpe.vocabulary().size()) {
  const json& tokens = member(file.rest, "added_tokens");
  require(tokens.is_null() || tokens.is_array(), name, ": added_tokens is ", tokens.type_name(),
          ", expected a list");
  for (const json& value : tokens) add_token(read_added_token(value, name));

  // Special tokens come first where two patterns are equal.
  Regex::Workspace regex;
  std::string buffer;
  for (const bool special : {true, false}) {
    for (const auto& token : added) {
      if (token->special != special) continue;
      if (token->normalized) {
        normalized_finder.add(normalizer.apply(token->content, regex, buffer), *token);
      } else {
        raw_finder.add(token->content, *token);
      }
    }
  }
  for (const auto* side : {&surroundings.before, &surroundings.after}) {
    for (const std::int64_t id : *side) {
      require(knows(id), name, ": post_processor adds the id ", id, ", which no token has");
    }
  }
}

void Tokenizer::Impl::add_token(AddedToken token) {
  if (token.content.empty()) return;
  const Vocabulary& vocabulary = bpe.vocabulary();
  const auto known = vocabulary.find(token.content);
  if (known && *known != token.id) {
    fail(ErrorKind::invalid_argument, name, ": the added token ", in_quotes(token.content), " has id ",
         token.id, ", but the vocabulary gives it ", *known);
  }
  if (!known && knows(token.id)) {
    fail(ErrorKind::invalid_argument, name, ": the added token ", in_quotes(token.content), " has the id ",
         token.id, " of ", in_quotes(this->token(token.id)));
  }
  vocab_size = std::max(vocab_size, std::int64_t{token.id} + 1);
  added.push_back(std::make_unique<const AddedToken>(std::move(token)));
  const AddedToken& kept = *added.back();
  if (!added_by_content.emplace(kept.content, &kept).second) {
    fail(ErrorKind::invalid_argument, name, ": the added token ", in_quotes(kept.content), " occurs twice");
  }
  added_by_id.emplace(kept.id, &kept);
}

bool Tokenizer::Impl::knows(std::int64_t id) const {
  return bpe.vocabulary().contains(id) || added_by_id.contains(id);
}

std::string_view Tokenizer::Impl::token(std::int64_t id) const {
  if (bpe.vocabulary().contains(id)) return bpe.vocabulary().token(static_cast<TokenId>(id));
  if (const auto at = added_by_id.find(id); at != added_by_id.end()) return at->second->content;
  fail(ErrorKind::invalid_argument, name, ": no token has the id ", id, " (ids are below ", vocab_size, ")");
}

bool Tokenizer::Impl::is_special(std::int64_t id) const {
  const auto at = added_by_id.find(id);
  return at != added_by_id.end() && at->second->special;
}

// See next_cut in text_files.h for what lies on both sides of such a cut. NFC composes nothing with it; an
// added token may neither contain one nor look beyond its own end.
bool Tokenizer::Impl::may_cut_before_space() const {
  return normalizer.is_nfc_or_nothing() && pre_tokenizer.is_gpt2() &&
         std::all_of(added.begin(), added.end(), [](const auto& token) {
           return !token->single_word && !token->rstrip &&
                  next_cut(token->content, 0) == token->content.size();
         });
}

// Text between added tokens that are found as they stand: normalizes it, finds those that are looked
// for in normalized text, and encodes what is left.
void Tokenizer::Impl::encode_section(std::string_view text, bool at_start, EncodeWorkspace& workspace,
                                     std::vector<std::int64_t>& ids) const {
  text = normalizer.apply(text, workspace.pieces.regex, workspace.normalized);
  workspace.normalized_sections.clear();
  normalized_finder.find(text, workspace.normalized_sections);
  for (const auto& [range, token] : workspace.normalized_sections) {
    if (token != nullptr) {
      ids.push_back(token->id);
      continue;
    }
    const std::string_view part = text.substr(range.begin, range.end - range.begin);
    const std::string_view pieces = pre_tokenizer.split(part, at_start && range.begin == 0, workspace.pieces);
    for (const Range& piece : workspace.pieces.pieces) {
      bpe.encode(pieces.substr(piece.begin, piece.end - piece.begin), workspace.bpe, ids);
    }
  }
}

Tokenizer Tokenizer::from_file(const std::filesystem::path& path) {
  std::error_code code;
  const auto status = std::filesystem::status(path, code);
  if (status.type() == std::filesystem::file_type::not_found) {
    fail(ErrorKind::not_found, path.string(), ": there is no such file");
  }
  require(!std::filesystem::is_directory(status), path.string(),
          ": is a directory, expected a tokenizer.json");
  std::ifstream in(path, std::ios::binary);
  std::string text;
  if (in) {
    const auto size = std::filesystem::file_size(path, code);
    if (!code) text.reserve(size);
    constexpr std::size_t kBlock = std::size_t{1} << 20;
    while (in) {
      const std::size_t before = text.size();
      text.resize(before + kBlock);
      in.read(text.data() + before, kBlock);
      text.resize(before + static_cast<std::size_t>(in.gcount()));
    }
  }
  if (!in.eof()) fail(ErrorKind::io, path.string(), ": cannot be read");
  return from_json(text, path.string());
}

Tokenizer Tokenizer::from_json(std::string_view text, std::string_view name) {
  return Tokenizer(std::make_shared<const Impl>(read_json_file(text, name), std::string(name)));
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  std::string repaired;
  if (!is_valid_utf8(text)) {
    append_valid_utf8(repaired, text, true);
    text = repaired;
  }
  auto lease = impl_->workspaces.take();
  EncodeWorkspace& workspace = *lease;
  std::vector<std::int64_t> ids;
  ids.reserve(text.size() / 4 + 8);
  if (options.add_special_tokens) ids = impl_->surroundings.before;

  workspace.sections.clear();
  impl_->raw_finder.find(text, workspace.sections);
  for (const auto& [range, token] : workspace.sections) {
    if (token != nullptr) {
      ids.push_back(token->id);
    } else {
      impl_->encode_section(text.substr(range.begin, range.end - range.begin), range.begin == 0, workspace,
                            ids);
    }
  }
  if (options.add_special_tokens) {
    ids.insert(ids.end(), impl_->surroundings.after.begin(), impl_->surroundings.after.end());
  }
  if (text.size() > kLargeText) lease.discard();
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int64_t> ids, bool skip_special) const {
  Decoder::Stream stream(impl_->decoder);
  for (const std::int64_t id : ids) {
    const std::string_view token = impl_->token(id);
    if (!skip_special || !impl_->is_special(id)) stream.push(token);
  }
  stream.finish();
  return stream.take();
}

std::int64_t Tokenizer::vocab_size() const { return impl_->vocab_size; }

std::optional<std::int64_t> Tokenizer::token_to_id(std::string_view token) const {
  if (const auto at = impl_->added_by_content.find(token); at != impl_->added_by_content.end()) {
    return at->second->id;
  }
  if (const auto id = impl_->bpe.vocabulary().find(token)) return *id;
  return std::nullopt;
}

std::string_view Tokenizer::id_to_token(std::int64_t id) const { return impl_->token(id); }

bool Tokenizer::is_special(std::int64_t id) const { return impl_->is_special(id); }

bool Tokenizer::may_cut_before_space() const { return impl_->may_cut_before_space(); }

struct StreamDecoder::State {
  State(std::shared_ptr<const Tokenizer::Impl> tokenizer, bool skip)
      : impl(std::move(tokenizer)), skip_special(skip), stream(impl->decoder) {}

  std::shared_ptr<const Tokenizer::Impl> impl;
  bool skip_special;
  Decoder::Stream stream;
};

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : state_(std::make_unique<State>(tokenizer.impl_, skip_special)) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::push(std::int64_t id) {
  const std::string_view token = state_->impl->token(id);
  if (!state_->skip_special || !state_->impl->is_special(id)) state_->stream.push(token);
  return state_->stream.take();
}

std::string StreamDecoder::finish() {
  state_->stream.finish();
  return state_->stream.take();
}

}  // namespace krait
