// TOML (https://toml.io, version 1.0), as JSON values.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace krait {

// Throws Error(invalid_argument) with `name`, line and column where `text` is not TOML. Dates and times
// become texts.
[[nodiscard]] nlohmann::json parse_toml(std::string_view text, const std::string& name);

}  // namespace krait
