// Texts as Python sees them, which the conventions of evaluation are written in.
#pragma once

#include <cstdint>
#include <string_view>

namespace krait {

// str.strip(), lstrip() and rstrip(): without white space, Unicode's included, at the ends.
[[nodiscard]] std::string_view strip_left(std::string_view text);
[[nodiscard]] std::string_view strip_right(std::string_view text);
[[nodiscard]] inline std::string_view strip(std::string_view text) { return strip_left(strip_right(text)); }

// len(text): characters. Bytes that are not UTF-8 count as one each.
[[nodiscard]] std::int64_t count_characters(std::string_view text);

// len(re.split(r"\s+", text)): words between white space, where a text that begins or ends with white space
// has an empty word there.
[[nodiscard]] std::int64_t count_words(std::string_view text);

}  // namespace krait
