#include "json_object.h"

#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

namespace krait::cli {
namespace {

// The shortest text that reads back as the same number.
template <typename T>
std::string shortest(T value) {
  if (!std::isfinite(value)) return "null";
  std::array<char, 32> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr;
  return {buffer.data(), end};
}

template <typename Items, typename Write>
std::string list(const Items& items, const Write& write) {
  std::string text;
  for (const auto& item : items) text += (text.empty() ? "" : ",") + write(item);
  return text;
}

}  // namespace

std::string json_string(std::string_view text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

JsonObject& JsonObject::add_raw(std::string_view name, std::string_view value) {
  if (!members_.empty()) members_ += ',';
  members_.append(json_string(name)).append(":").append(value);
  return *this;
}

JsonObject& JsonObject::add(std::string_view name, std::string_view value) {
  return add_raw(name, json_string(value));
}

JsonObject& JsonObject::add(std::string_view name, double value) { return add_raw(name, shortest(value)); }

JsonObject& JsonObject::add(std::string_view name, const std::vector<std::int64_t>& values) {
  return add_raw(name, "[" + list(values, [](std::int64_t v) { return std::to_string(v); }) + "]");
}

JsonObject& JsonObject::add(std::string_view name, const std::vector<float>& values) {
  return add_raw(name, "[" + list(values, [](float v) { return shortest(v); }) + "]");
}

JsonObject& JsonObject::add(std::string_view name, const std::vector<double>& values) {
  return add_raw(name, "[" + list(values, [](double v) { return shortest(v); }) + "]");
}

JsonObject& JsonObject::add(std::string_view name, const std::vector<bool>& values) {
  return add_raw(name, "[" + list(values, [](bool v) { return std::string(v ? "true" : "false"); }) + "]");
}

JsonObject& JsonObject::add(std::string_view name, const JsonObject& object) {
  return add_raw(name, object.text());
}

JsonObject& JsonObject::add(std::string_view name, const std::map<std::string, std::int64_t>& members) {
  JsonObject object;
  for (const auto& [key, value] : members) object.add(key, value);
  return add_raw(name, object.text());
}

JsonObject& JsonObject::add(std::string_view name, const std::vector<JsonObject>& objects) {
  return add_raw(name, "[" + list(objects, [](const JsonObject& o) { return o.text(); }) + "]");
}

}  // namespace krait::cli
