// The only place that includes toml++, which takes long to compile.
#include "train/toml.h"

#include <sstream>
#include <utility>

#include "io/text.h"
#include "krait/core/error.h"

#define TOML_HEADER_ONLY 1
#define TOML_ENABLE_FORMATTERS 1
#include <toml++/toml.h>

namespace krait {
namespace {

using nlohmann::json;

json value_of(const toml::node& node) {
  if (const auto* table = node.as_table()) {
    json object = json::object();
    for (const auto& [key, value] : *table) object[std::string(key.str())] = value_of(value);
    return object;
  }
  if (const auto* array = node.as_array()) {
    json list = json::array();
    for (const auto& value : *array) list.push_back(value_of(value));
    return list;
  }
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* integer = node.as_integer()) return integer->get();
  if (const auto* number = node.as_floating_point()) return number->get();
  if (const auto* boolean = node.as_boolean()) return boolean->get();
  std::ostringstream text;
  node.visit([&](const auto& value) { text << value; });
  return text.str();
}

}  // namespace

json parse_toml(std::string_view text, const std::string& name) {
  try {
    const toml::table table = toml::parse(text);
    return value_of(table);
  } catch (const toml::parse_error& error) {
    const auto& at = error.source().begin;
    std::string reason(error.description());
    for (char& c : reason)
      if (static_cast<unsigned char>(c) < 0x20) c = ' ';
    fail(ErrorKind::invalid_argument, name, ":", at.line, ":", at.column, ": is not TOML: ", reason);
  }
}

}  // namespace krait
