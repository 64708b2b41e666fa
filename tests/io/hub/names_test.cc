#include "io/hub/names.h"

#include <gtest/gtest.h>

#include "krait/io/hub.h"

namespace krait::hub {
namespace {

TEST(HubNames, ParseModelIds) {
  const auto plain = parse_model_id("state-spaces/mamba-130m");
  ASSERT_TRUE(plain);
  EXPECT_EQ(plain->repo, "state-spaces/mamba-130m");
  EXPECT_EQ(plain->revision, "main");
  const auto revision = parse_model_id("org/na_me.v1@refs/pr/1");
  ASSERT_TRUE(revision);
  EXPECT_EQ(revision->repo, "org/na_me.v1");
  EXPECT_EQ(revision->revision, "refs/pr/1");
  ASSERT_TRUE(parse_model_id("gpt2"));
  EXPECT_EQ(parse_model_id("gpt2")->repo, "gpt2");
}

TEST(HubNames, RefuseWhatIsNoModelId) {
  using std::string_literals::operator""s;
  const std::string cases[] = {"",
                               "/",
                               "a/",
                               "/a",
                               "a/b/c",
                               "./a",
                               "../a",
                               "a/..",
                               "a//b",
                               "a--b/c",
                               "a/b--c",
                               "a..b/c",
                               "-a/b",
                               "a/b.",
                               "a/b.git",
                               "~/a",
                               "/data/x",
                               "a b",
                               "a/b@",
                               "a/b@..",
                               "a/b@x..y",
                               "a/b@/x",
                               "a/b@x/",
                               "a/b@x/../y",
                               "a/b@x@{1}",
                               "a/b@x y",
                               "a/b@x\n",
                               "a/b@.x",
                               "a/b@x.lock",
                               "a\\b",
                               "a/b@x\\y",
                               "a/b\0"s,
                               "a/b@x\0y"s,
                               "a/b?c",
                               "a/b#c",
                               "a/b%2f",
                               "\xc3\xa9/b",
                               "a/b@x^",
                               std::string(97, 'a'),
                               "a/b@" + std::string(300, 'x')};
  for (const std::string& text : cases) EXPECT_FALSE(parse_model_id(text)) << text;
}

TEST(HubNames, FileNamesStayBelowTheirDirectory) {
  for (const char* good : {"config.json", "a/b.safetensors", "..a", "a..", ".hidden", "model 1.bin"})
    EXPECT_TRUE(is_safe_file_name(good)) << good;
  using std::string_literals::operator""s;
  for (const std::string& bad : {""s, "/etc/passwd"s, ".."s, "../a"s, "a/../b"s, "a/.."s, "."s, "a//b"s,
                                 "a/"s, "./a"s, "a\0b"s, "a\nb"s, "..\\a"s, std::string(256, 'x')})
    EXPECT_FALSE(is_safe_file_name(bad)) << bad;
}

TEST(HubNames, EtagsAreNamesOfFiles) {
  EXPECT_EQ(strip_etag("\"abc\""), "abc");
  EXPECT_EQ(strip_etag("W/\"abc\""), "abc");
  EXPECT_EQ(strip_etag("abc"), "abc");
  EXPECT_EQ(strip_etag("\""), "\"");
  EXPECT_TRUE(is_safe_etag("d41d8cd98f00b204e9800998ecf8427e-12"));
  for (const char* bad : {"", "..", "../x", "a/b", ".x", "a b", "\"", "a\\b"})
    EXPECT_FALSE(is_safe_etag(bad)) << bad;
  EXPECT_FALSE(is_safe_etag(std::string(200, 'a')));
}

TEST(HubNames, PercentEncoding) {
  EXPECT_EQ(percent_encoded("refs/pr/1"), "refs%2Fpr%2F1");
  EXPECT_EQ(percent_encoded("a/b c?#%\xc3\xa9~", "/"), "a/b%20c%3F%23%25%C3%A9~");
}

TEST(HubNames, Commits) {
  EXPECT_TRUE(is_commit("0123456789abcdef0123456789abcdef01234567"));
  EXPECT_FALSE(is_commit("0123456789ABCDEF0123456789abcdef01234567"));
  EXPECT_FALSE(is_commit("0123456789abcdef0123456789abcdef0123456"));
  EXPECT_FALSE(is_commit("main"));
}

}  // namespace
}  // namespace krait::hub
