// Reading fields of a JSON object with messages that name the file, the field, what was found and what was
// expected.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace krait {

// Parses JSON as Python writes it: Infinity, -Infinity, NaN and numbers beyond a double are accepted, as
// {"__float__": "Infinity"} and so on. Throws Error naming `name`.
nlohmann::json parse_json(std::string_view text, const std::string& name);

class JsonFields {
 public:
  // `object` must outlive the reader; `path` is "config.json: ssm_cfg" or the like.
  JsonFields(const nlohmann::json& object, std::string path);

  [[nodiscard]] bool has(std::string_view key) const;  // present and not null
  [[nodiscard]] std::int64_t integer(std::string_view key, std::int64_t fallback, std::int64_t low = 1,
                                     std::int64_t high = std::int64_t{1} << 24) const;
  [[nodiscard]] double number(std::string_view key, double fallback) const;
  [[nodiscard]] bool boolean(std::string_view key, bool fallback) const;
  [[nodiscard]] std::string string(std::string_view key, const std::string& fallback) const;
  [[nodiscard]] std::vector<std::int64_t> integers(
      std::string_view key) const;  // one or a list; empty: absent
  [[nodiscard]] std::vector<double> numbers(std::string_view key) const;
  [[nodiscard]] JsonFields object(std::string_view key) const;  // an empty object where absent
  [[nodiscard]] bool is_string(std::string_view key) const;
  // Throws where a key is none of `known`.
  void only(std::initializer_list<std::string_view> known) const;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  [[nodiscard]] const nlohmann::json* find(std::string_view key) const;
  [[noreturn]] void wrong_type(std::string_view key, std::string_view expected) const;

  const nlohmann::json* object_;
  std::string path_;
};

}  // namespace krait
