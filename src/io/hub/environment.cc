#include <algorithm>
#include <array>
#include <cstdlib>
#include <fstream>
#include <initializer_list>

#include "krait/io/hub.h"

namespace krait::hub {
namespace {

namespace fs = std::filesystem;

// The first of `names` that is set and not empty.
std::string variable(std::initializer_list<const char*> names) {
  for (const char* name : names) {
    const char* value = std::getenv(name);
    if (value != nullptr && *value != '\0') return value;
  }
  return {};
}

// "~/x" as $HOME/x; shells do not expand it inside quotation marks.
fs::path expanded(const std::string& path) {
  if (path == "~" || path.starts_with("~/")) {
    const std::string home = variable({"HOME"});
    if (!home.empty()) return fs::path(home) / path.substr(std::min<std::size_t>(2, path.size()));
  }
  return path;
}

bool is_true(std::string text) {
  std::ranges::transform(text, text.begin(),
                         [](char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c; });
  return text == "1" || text == "ON" || text == "YES" || text == "TRUE";
}

std::string trimmed(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n\v\f";
  const std::size_t first = text.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return std::string(text.substr(first, text.find_last_not_of(kSpace) - first + 1));
}

// Empty where there is no such file: most people have none.
std::string read_token(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::array<char, 4096> text{};
  file.read(text.data(), text.size());
  return trimmed({text.data(), static_cast<std::size_t>(file.gcount())});
}

// huggingface_hub's own folder; empty where nothing says where it could be.
fs::path home_folder() {
  if (const std::string home = variable({"HF_HOME"}); !home.empty()) return expanded(home);
  if (const std::string cache = variable({"XDG_CACHE_HOME"}); !cache.empty())
    return expanded(cache) / "huggingface";
  if (const std::string home = variable({"HOME"}); !home.empty())
    return fs::path(home) / ".cache" / "huggingface";
  return {};
}

}  // namespace

Options options_from_environment() {
  Options options;
  const fs::path home = home_folder();
  const std::string cache = variable({"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"});
  if (!cache.empty()) {
    options.cache = expanded(cache);
  } else if (!home.empty()) {
    options.cache = home / "hub";
  }
  if (const std::string endpoint = variable({"HF_ENDPOINT"}); !endpoint.empty()) options.endpoint = endpoint;
  options.token = trimmed(variable({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}));
  if (options.token.empty()) {
    const std::string path = variable({"HF_TOKEN_PATH"});
    if (!path.empty()) {
      options.token = read_token(expanded(path));
    } else if (!home.empty()) {
      options.token = read_token(home / "token");
    }
  }
  options.offline = is_true(variable({"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}));
  options.ca_bundle =
      expanded(variable({"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"}));
  return options;
}

}  // namespace krait::hub
