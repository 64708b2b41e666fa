#include "models/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "krait/core/error.h"

namespace krait {
namespace {

using nlohmann::json;

bool is_word(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_number_part(char c) {
  return (c >= '0' && c <= '9') || c == '+' || c == '-' || c == '.' || c == 'e' || c == 'E';
}

// Rewrites what Python's json writes beyond the standard into {"__float__": "..."}.
std::string standard_json(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  const auto special = [&](std::string_view name) {
    out.append(R"({"__float__": ")").append(name).append("\"}");
  };
  std::size_t i = 0;
  while (i < text.size()) {
    if (text[i] == '"') {
      const std::size_t begin = i++;
      while (i < text.size() && text[i] != '"') i += text[i] == '\\' ? 2 : 1;
      i = std::min(i + 1, text.size());
      out.append(text.substr(begin, i - begin));
      continue;
    }
    const std::size_t begin = i;
    if (text[i] == '-' && text.substr(i + 1, 8) == "Infinity") {
      special("-Infinity");
      i += 9;
    } else if (is_word(text[i])) {
      while (i < text.size() && is_word(text[i])) ++i;
      const std::string_view word = text.substr(begin, i - begin);
      if (word == "Infinity" || word == "NaN")
        special(word);
      else
        out.append(word);
    } else if ((text[i] >= '0' && text[i] <= '9') || text[i] == '-') {
      while (i < text.size() && is_number_part(text[i])) ++i;
      const std::string_view number = text.substr(begin, i - begin);
      double value = 0.0;
      const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), value);
      // Out of range also for numbers too small for a double; those the parser reads as 0.
      if (error == std::errc::result_out_of_range && end == number.data() + number.size() &&
          std::isinf(std::strtod(std::string(number).c_str(), nullptr)))
        special(number.front() == '-' ? "-Infinity" : "Infinity");
      else
        out.append(number);
    } else {
      out.push_back(text[i++]);
    }
  }
  return out;
}

std::string show(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

std::optional<double> as_number(const json& value) {
  if (value.is_number()) return value.get<double>();
  if (value.is_object() && value.size() == 1 && value.contains("__float__") &&
      value["__float__"].is_string()) {
    const auto& name = value["__float__"].get_ref<const std::string&>();
    if (name == "Infinity") return std::numeric_limits<double>::infinity();
    if (name == "-Infinity") return -std::numeric_limits<double>::infinity();
  }
  return std::nullopt;
}

// Integers may be written as 2.0.
std::optional<std::int64_t> as_integer(const json& value) {
  if (value.is_number_unsigned()) {
    const auto u = value.get<std::uint64_t>();
    if (u > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return std::nullopt;
    return static_cast<std::int64_t>(u);
  }
  if (value.is_number_integer()) return value.get<std::int64_t>();
  if (value.is_number_float()) {
    const double d = value.get<double>();
    if (d == std::floor(d) && std::abs(d) < 0x1p53) return static_cast<std::int64_t>(d);
  }
  return std::nullopt;
}

}  // namespace

json parse_json(std::string_view text, const std::string& name) {
  // Deeper than any configuration; the parser keeps its stack on the heap, but dump and destructors do not.
  constexpr int kMaxDepth = 64;
  const auto limit_depth = [&](int depth, json::parse_event_t, const json&) {
    require(depth <= kMaxDepth, name, ": nested deeper than ", int{kMaxDepth}, " levels");
    return true;
  };
  try {
    return json::parse(standard_json(text), limit_depth);
  } catch (const json::exception& e) {
    std::string what = e.what();
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..." without its first word.
    if (const auto end = what.find("] "); end != std::string::npos) what = what.substr(end + 2);
    fail(ErrorKind::invalid_argument, name, ": not JSON: ", what);
  }
}

JsonFields::JsonFields(const json& object, std::string path) : object_(&object), path_(std::move(path)) {
  require(object.is_object(), path_, " is ", show(object), ", expected an object");
}

const json* JsonFields::find(std::string_view key) const {
  const auto it = object_->find(key);
  return it == object_->end() || it->is_null() ? nullptr : &*it;
}

void JsonFields::wrong_type(std::string_view key, std::string_view expected) const {
  fail(ErrorKind::invalid_argument, path_, ": ", key, " is ", show(*find(key)), ", expected ", expected);
}

bool JsonFields::has(std::string_view key) const { return find(key) != nullptr; }

bool JsonFields::is_string(std::string_view key) const {
  const json* value = find(key);
  return value != nullptr && value->is_string();
}

std::int64_t JsonFields::integer(std::string_view key, std::int64_t fallback, std::int64_t low,
                                 std::int64_t high) const {
  const json* value = find(key);
  if (value == nullptr) return fallback;
  const auto number = as_integer(*value);
  if (!number || *number < low || *number > high)
    wrong_type(key, concat("an integer from ", low, " to ", high));
  return *number;
}

double JsonFields::number(std::string_view key, double fallback) const {
  const json* value = find(key);
  if (value == nullptr) return fallback;
  const auto number = as_number(*value);
  if (!number) wrong_type(key, "a number");
  return *number;
}

bool JsonFields::boolean(std::string_view key, bool fallback) const {
  const json* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) wrong_type(key, "true or false");
  return value->get<bool>();
}

std::string JsonFields::string(std::string_view key, const std::string& fallback) const {
  const json* value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_string()) wrong_type(key, "a string");
  return value->get<std::string>();
}

std::vector<std::int64_t> JsonFields::integers(std::string_view key) const {
  const json* value = find(key);
  if (value == nullptr) return {};
  std::vector<std::int64_t> list;
  for (const json& item : value->is_array() ? *value : json::array({*value})) {
    const auto number = as_integer(item);
    if (!number) wrong_type(key, "an integer or a list of integers");
    list.push_back(*number);
  }
  return list;
}

std::vector<double> JsonFields::numbers(std::string_view key) const {
  const json* value = find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) wrong_type(key, "a list of numbers");
  std::vector<double> list;
  for (const json& item : *value) {
    const auto number = as_number(item);
    if (!number) wrong_type(key, "a list of numbers");
    list.push_back(*number);
  }
  return list;
}

JsonFields JsonFields::object(std::string_view key) const {
  static const json kEmpty = json::object();
  const json* value = find(key);
  return {value == nullptr ? kEmpty : *value, concat(path_, ": ", key)};
}

void JsonFields::only(std::initializer_list<std::string_view> known) const {
  for (const auto& item : object_->items()) {
    if (std::find(known.begin(), known.end(), item.key()) != known.end()) continue;
    std::string list;
    for (const std::string_view name : known) list.append(list.empty() ? "" : ", ").append(name);
    fail(ErrorKind::invalid_argument, path_, ": unknown field ", item.key(), ", expected one of ", list);
  }
}

}  // namespace krait
