// Names that come from the user or from the server, and that become parts of paths and addresses.
#pragma once

#include <string>
#include <string_view>

namespace krait::hub {

[[nodiscard]] bool is_repo_name(std::string_view text);
// A branch, tag or commit, by the rules of git check-ref-format.
[[nodiscard]] bool is_revision(std::string_view text);
// 40 lower-case hexadecimal digits.
[[nodiscard]] bool is_commit(std::string_view text);
// A relative path of a file that stays below the directory it is joined to.
[[nodiscard]] bool is_safe_file_name(std::string_view text);
// Usable as the name of a blob.
[[nodiscard]] bool is_safe_etag(std::string_view text);
[[nodiscard]] bool is_hexadecimal(std::string_view text);

// The value of an ETag header without W/ and quotation marks.
[[nodiscard]] std::string strip_etag(std::string_view header);

// Percent-encoding of everything but letters, digits and "-._~", and the characters of `keep`.
[[nodiscard]] std::string percent_encoded(std::string_view text, std::string_view keep = {});

}  // namespace krait::hub
