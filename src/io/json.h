// JSON from files that may be damaged or hostile.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace krait::io {

// Parses `text`. Throws Error(invalid_argument) beginning with `what` where it is not JSON, is nested
// deeper than `max_depth`, or where an object has a key twice (of which parsers keep either).
[[nodiscard]] nlohmann::json parse_json(std::string_view text, int max_depth, const std::string& what);

}  // namespace krait::io
