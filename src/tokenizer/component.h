// Typed access to the objects of a tokenizer.json, with errors that name the file, the object and the
// field.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "krait/core/error.h"
#include "tokenizer/unicode.h"

namespace krait::tokenizer {

// The fields of a JSON object.
class Fields {
 public:
  // `where` is the beginning of every message, such as "tokenizer.json: model".
  Fields(const nlohmann::json& value, std::string where) : value_(&value), where_(std::move(where)) {
    if (!value.is_object()) {
      fail(ErrorKind::invalid_argument, where_, " is ", value.type_name(), ", expected an object");
    }
  }

  [[nodiscard]] const std::string& where() const { return where_; }
  [[nodiscard]] bool has(const char* name) const {
    return value_->contains(name) && !value_->at(name).is_null();
  }

  [[nodiscard]] const nlohmann::json& field(const char* name) const {
    if (!has(name)) fail(ErrorKind::invalid_argument, where_, " has no ", name);
    return value_->at(name);
  }
  [[nodiscard]] bool flag(const char* name) const {
    if (!field(name).is_boolean()) refuse(name, "true or false");
    return value_->at(name).get<bool>();
  }
  [[nodiscard]] bool flag(const char* name, bool absent) const { return has(name) ? flag(name) : absent; }
  [[nodiscard]] std::string text(const char* name) const {
    if (!field(name).is_string()) refuse(name, "a string");
    return value_->at(name).get<std::string>();
  }
  [[nodiscard]] std::string text(const char* name, std::string_view absent) const {
    return has(name) ? text(name) : std::string(absent);
  }
  // A string of exactly one character.
  [[nodiscard]] char32_t character(const char* name) const {
    const std::string value = text(name);
    if (value.empty() || code_point_at(value, 0).length != value.size()) refuse(name, "one character");
    return code_point_at(value, 0).value;
  }
  [[nodiscard]] std::size_t count(const char* name) const {
    if (!field(name).is_number_unsigned()) refuse(name, "a count");
    return value_->at(name).get<std::size_t>();
  }
  [[nodiscard]] const nlohmann::json& list(const char* name) const {
    if (!field(name).is_array()) refuse(name, "a list");
    return value_->at(name);
  }

  [[noreturn]] void refuse(const char* name, std::string_view expected) const {
    const nlohmann::json& found = value_->at(name);
    fail(ErrorKind::invalid_argument, where_, ": ", name, " is ",
         found.is_structured() ? std::string(found.type_name()) : in_quotes(found.dump()), ", expected ",
         expected);
  }

 private:
  const nlohmann::json* value_;
  std::string where_;
};

// A normalizer, pre-tokenizer, decoder or post-processor, which says its type.
class Component : public Fields {
 public:
  // `role` is such as "tokenizer.json: pre_tokenizer"; messages add the type.
  Component(const nlohmann::json& value, const std::string& role)
      : Fields(value, concat(role, " ", Fields(value, role).text("type"))),
        role_(role),
        type_(text("type")) {}

  [[nodiscard]] const std::string& type() const { return type_; }

  // The components of a Sequence.
  [[nodiscard]] std::vector<Component> parts(const char* name) const {
    std::vector<Component> parts;
    for (const nlohmann::json& part : list(name)) parts.emplace_back(part, role_);
    return parts;
  }

  [[noreturn]] void refuse_type(std::string_view supported) const {
    fail(ErrorKind::invalid_argument, role_, " ", in_quotes(type_), " is not supported, expected ",
         supported);
  }

 private:
  std::string role_;
  std::string type_;
};

}  // namespace krait::tokenizer
