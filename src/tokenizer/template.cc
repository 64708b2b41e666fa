#include "tokenizer/template.h"

#include <optional>
#include <string>
#include <utility>

#include "krait/core/error.h"

namespace krait::tokenizer {
namespace {

using nlohmann::json;

// The ids of the special token `id` of the template.
std::vector<std::int64_t> special_ids(const Component& component, const std::string& id) {
  const json& tokens = component.field("special_tokens");
  if (!tokens.is_object() || !tokens.contains(id)) {
    fail(ErrorKind::invalid_argument, component.where(), ": special_tokens has no ", in_quotes(id));
  }
  const json& token = tokens.at(id);
  if (!token.is_object() || !token.contains("ids") || !token.at("ids").is_array()) {
    fail(ErrorKind::invalid_argument, component.where(), ": special_tokens ", in_quotes(id),
         " has no list of ids");
  }
  std::vector<std::int64_t> ids;
  for (const json& value : token.at("ids")) {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > 0xFFFFFFFFU) {
      fail(ErrorKind::invalid_argument, component.where(), ": special_tokens ", in_quotes(id), " has the id ",
           in_quotes(value.dump()), ", expected a token's");
    }
    ids.push_back(value.get<std::int64_t>());
  }
  return ids;
}

// The "id" of a piece {kind: {"id": ...}}; null where it is of another kind.
const json* id_of(const json& piece, const char* kind) {
  if (!piece.is_object() || !piece.contains(kind)) return nullptr;
  const json& body = piece.at(kind);
  return body.is_object() && body.contains("id") && body.at("id").is_string() ? &body.at("id") : nullptr;
}

Template surroundings(const Component& component) {
  const json& pieces = component.field("single");
  if (!pieces.is_array()) component.refuse("single", "a list");
  std::vector<std::int64_t> before;
  std::vector<std::int64_t> after;
  int texts = 0;
  for (const json& piece : pieces) {
    if (const json* sequence = id_of(piece, "Sequence"); sequence != nullptr && *sequence == "A") {
      ++texts;
    } else if (const json* special = id_of(piece, "SpecialToken"); special != nullptr) {
      const auto ids = special_ids(component, special->get<std::string>());
      auto& side = texts == 0 ? before : after;
      side.insert(side.end(), ids.begin(), ids.end());
    } else {
      component.refuse("single", "special tokens and the sequence A");
    }
  }
  if (texts != 1) component.refuse("single", "the sequence A once");
  return {std::move(before), std::move(after)};
}

void add(std::optional<Template>& result, const Component& component) {
  if (component.type() == "TemplateProcessing") {
    require(!result, component.where(), ": there is a second one, expected one at most");
    result = surroundings(component);
  } else if (component.type() == "Sequence") {
    for (const Component& part : component.parts("processors")) add(result, part);
  } else if (component.type() != "ByteLevel") {
    component.refuse_type("ByteLevel, TemplateProcessing or Sequence");
  }
}

}  // namespace

Template read_template(const json& config, std::string_view name) {
  std::optional<Template> result;
  if (!config.is_null()) add(result, Component(config, concat(name, ": post_processor")));
  return result.value_or(Template{});
}

}  // namespace krait::tokenizer
