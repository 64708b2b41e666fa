#include <gtest/gtest.h>
#include <stdlib.h>

#include <map>
#include <optional>

#include "io/scratch.h"
#include "krait/io/hub.h"

namespace krait::hub {
namespace {

// Sets variables, all others that matter being unset, and restores them.
class Environment {
 public:
  explicit Environment(const std::map<std::string, std::string>& values) {
    for (const char* name :
         {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME", "HF_ENDPOINT",
          "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
          "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"}) {
      const char* value = ::getenv(name);
      before_[name] = value == nullptr ? std::nullopt : std::optional<std::string>(value);
      ::unsetenv(name);
    }
    for (const auto& [name, value] : values) ::setenv(name.c_str(), value.c_str(), 1);
  }
  ~Environment() {
    for (const auto& [name, value] : before_) {
      if (value) {
        ::setenv(name.c_str(), value->c_str(), 1);
      } else {
        ::unsetenv(name.c_str());
      }
    }
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  std::map<std::string, std::optional<std::string>> before_;
};

Options with(const std::map<std::string, std::string>& values) {
  const Environment environment(values);
  return options_from_environment();
}

TEST(HubEnvironment, Cache) {
  EXPECT_EQ(with({}).cache, "");
  EXPECT_EQ(with({{"HOME", "/h"}}).cache, "/h/.cache/huggingface/hub");
  EXPECT_EQ(with({{"HOME", "/h"}, {"XDG_CACHE_HOME", "/x"}}).cache, "/x/huggingface/hub");
  EXPECT_EQ(with({{"HOME", "/h"}, {"XDG_CACHE_HOME", "/x"}, {"HF_HOME", "/hf"}}).cache, "/hf/hub");
  EXPECT_EQ(with({{"HF_HOME", "/hf"}, {"HF_HUB_CACHE", "/c"}}).cache, "/c");
  EXPECT_EQ(with({{"HOME", "/h"}, {"HF_HUB_CACHE", ""}, {"HF_HOME", ""}}).cache, "/h/.cache/huggingface/hub");
  EXPECT_EQ(with({{"HOME", "/h"}, {"HF_HUB_CACHE", "~/c"}}).cache, "/h/c");
  EXPECT_EQ(with({{"HOME", "/h"}, {"HF_HOME", "~"}}).cache.lexically_normal(), "/h/hub");
}

TEST(HubEnvironment, EndpointAndOffline) {
  EXPECT_EQ(with({}).endpoint, "https://huggingface.co");
  EXPECT_EQ(with({{"HF_ENDPOINT", "http://mirror:8080"}}).endpoint, "http://mirror:8080");
  EXPECT_FALSE(with({}).offline);
  for (const char* value : {"1", "on", "Yes", "TRUE"})
    EXPECT_TRUE(with({{"HF_HUB_OFFLINE", value}}).offline) << value;
  for (const char* value : {"0", "", "no", "off"})
    EXPECT_FALSE(with({{"HF_HUB_OFFLINE", value}}).offline) << value;
  EXPECT_TRUE(with({{"TRANSFORMERS_OFFLINE", "1"}}).offline);
  EXPECT_EQ(with({}).ca_bundle, "");
  EXPECT_EQ(with({{"SSL_CERT_FILE", "/s"}, {"REQUESTS_CA_BUNDLE", "/r"}}).ca_bundle, "/r");
  EXPECT_EQ(with({{"SSL_CERT_DIR", "/d:/e"}, {"CURL_CA_BUNDLE", "/c"}, {"SSL_CERT_FILE", "/s"}}).ca_bundle,
            "/c");
  EXPECT_EQ(with({{"SSL_CERT_DIR", "/d:/e"}, {"SSL_CERT_FILE", "/s"}}).ca_bundle, "/s");
  EXPECT_EQ(with({{"SSL_CERT_DIR", "/d:/e"}}).ca_bundle, "/d:/e");
}

TEST(HubEnvironment, Token) {
  const io::Scratch scratch;
  const std::string home = scratch.path().string();
  EXPECT_EQ(with({{"HF_HOME", home}}).token, "");
  scratch.put("token", " hf_home\r\n");
  const std::string other = scratch.put("other", "hf_other\n").string();
  EXPECT_EQ(with({{"HF_HOME", home}}).token, "hf_home");
  EXPECT_EQ(with({{"HF_HOME", home}, {"HF_TOKEN_PATH", other}}).token, "hf_other");
  EXPECT_EQ(with({{"HF_HOME", home}, {"HF_TOKEN_PATH", other}, {"HF_TOKEN", "hf_variable\n"}}).token,
            "hf_variable");
  EXPECT_EQ(with({{"HF_HOME", home}, {"HF_TOKEN", " "}}).token, "hf_home");
  EXPECT_EQ(with({{"HF_TOKEN_PATH", home}}).token, "") << "a directory";
}

}  // namespace
}  // namespace krait::hub
