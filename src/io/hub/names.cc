#include "io/hub/names.h"

#include <algorithm>
#include <optional>

#include "krait/io/hub.h"

namespace krait::hub {
namespace {

constexpr std::size_t kLongestName = 96;       // of a repository, the hub's limit
constexpr std::size_t kLongestRevision = 200;  // with room for a suffix below the 255 of file systems
constexpr std::size_t kLongestComponent = 255;

// <cctype> depends on the locale.
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_alphanumeric(char c) { return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_control(char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }
bool is_one_of(char c, std::string_view set) { return set.find(c) != std::string_view::npos; }

// Calls `accept` with each piece between slashes, until one is refused.
template <typename Accept>
bool all_components(std::string_view path, Accept accept) {
  for (;;) {
    const std::size_t slash = path.find('/');
    if (!accept(path.substr(0, slash))) return false;
    if (slash == std::string_view::npos) return true;
    path.remove_prefix(slash + 1);
  }
}

bool is_name_component(std::string_view text) {
  const auto at_an_end = [](char c) { return is_alphanumeric(c) || c == '_'; };
  return !text.empty() && at_an_end(text.front()) && at_an_end(text.back()) &&
         std::ranges::all_of(text, [](char c) { return is_alphanumeric(c) || is_one_of(c, "-_."); });
}

}  // namespace

bool is_repo_name(std::string_view text) {
  return text.size() <= kLongestName && std::ranges::count(text, '/') <= 1 &&
         all_components(text, is_name_component) && text.find("--") == std::string_view::npos &&
         text.find("..") == std::string_view::npos && !text.ends_with(".git");
}

bool is_revision(std::string_view text) {
  const auto is_component = [](std::string_view part) {
    return !part.empty() && part.front() != '.' && part.back() != '.' && !part.ends_with(".lock");
  };
  return text.size() <= kLongestRevision && all_components(text, is_component) &&
         text.find("..") == std::string_view::npos && text.find("@{") == std::string_view::npos &&
         std::ranges::none_of(text, [](char c) { return is_control(c) || is_one_of(c, " ~^:?*[\\"); });
}

bool is_hexadecimal(std::string_view text) {
  return std::ranges::all_of(text, [](char c) { return is_digit(c) || (c >= 'a' && c <= 'f'); });
}

bool is_commit(std::string_view text) { return text.size() == 40 && is_hexadecimal(text); }

bool is_safe_file_name(std::string_view text) {
  const auto is_component = [](std::string_view part) {
    return !part.empty() && part != "." && part != ".." && part.size() <= kLongestComponent;
  };
  return all_components(text, is_component) &&
         std::ranges::none_of(text, [](char c) { return is_control(c) || c == '\\'; });
}

bool is_safe_etag(std::string_view text) {
  return !text.empty() && text.size() <= 128 && text.front() != '.' &&
         std::ranges::all_of(text, [](char c) { return is_alphanumeric(c) || is_one_of(c, "-_.+="); });
}

std::string strip_etag(std::string_view header) {
  if (header.starts_with("W/")) header.remove_prefix(2);
  if (header.size() >= 2 && header.front() == '"' && header.back() == '"') {
    header.remove_prefix(1);
    header.remove_suffix(1);
  }
  return std::string(header);
}

std::string percent_encoded(std::string_view text, std::string_view keep) {
  constexpr std::string_view kHex = "0123456789ABCDEF";
  std::string out;
  for (const char c : text) {
    if (is_alphanumeric(c) || is_one_of(c, "-._~") || is_one_of(c, keep)) {
      out += c;
    } else {
      const auto code = static_cast<unsigned char>(c);
      out += '%';
      out += kHex[code >> 4];
      out += kHex[code & 0xf];
    }
  }
  return out;
}

std::optional<ModelId> parse_model_id(std::string_view text) {
  ModelId id;
  const std::size_t at = text.find('@');
  id.repo = text.substr(0, at);
  if (at != std::string_view::npos) id.revision = text.substr(at + 1);
  if (!is_repo_name(id.repo) || !is_revision(id.revision)) return std::nullopt;
  return id;
}

}  // namespace krait::hub
