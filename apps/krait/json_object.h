// A JSON object, written member by member in the order of the calls.
#pragma once

#include <concepts>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace krait::cli {

class JsonObject {
 public:
  JsonObject& add(std::string_view name, std::string_view value);
  JsonObject& add(std::string_view name, const char* value) { return add(name, std::string_view(value)); }
  JsonObject& add(std::string_view name, double value);  // null where it is not finite
  JsonObject& add(std::string_view name, std::integral auto value) {
    if constexpr (std::same_as<decltype(value), bool>)
      return add_raw(name, value ? "true" : "false");
    else
      return add_raw(name, std::to_string(value));
  }
  JsonObject& add(std::string_view name, const std::vector<std::int64_t>& values);
  JsonObject& add(std::string_view name, const std::vector<float>& values);
  JsonObject& add(std::string_view name, const std::vector<double>& values);
  JsonObject& add(std::string_view name, const std::vector<bool>& values);
  JsonObject& add(std::string_view name, const std::map<std::string, std::int64_t>& members);
  JsonObject& add(std::string_view name, const std::vector<JsonObject>& objects);
  JsonObject& add(std::string_view name, const JsonObject& object);

  [[nodiscard]] std::string text() const { return "{" + members_ + "}"; }
  [[nodiscard]] std::string line() const { return text() + "\n"; }

 private:
  JsonObject& add_raw(std::string_view name, std::string_view value);

  std::string members_;
};

// A text as JSON writes it, with U+FFFD for what is not UTF-8.
std::string json_string(std::string_view text);

}  // namespace krait::cli
