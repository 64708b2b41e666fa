#include "io/hub/checksum.h"

#include <gtest/gtest.h>

#include "krait/core/error.h"

namespace krait::hub {
namespace {

std::string sum(std::size_t digits, std::string_view content, std::size_t piece) {
  Checksum checksum(std::string(digits, '0'), content.size());
  for (std::size_t at = 0; at < content.size(); at += piece) checksum.update(content.substr(at, piece));
  return checksum.finish();
}

TEST(HubChecksum, Sha256) {
  // FIPS 180-4, the example of one block, and the empty message.
  EXPECT_EQ(sum(64, "abc", 3), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sum(64, "abc", 1), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sum(64, "", 1), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

TEST(HubChecksum, Sha1OfGitBlobs) {
  // git hash-object
  EXPECT_EQ(sum(40, "hello\n", 6), "ce013625030ba8dba906f756967f9e9ca394464a");
  EXPECT_EQ(sum(40, "hello\n", 2), "ce013625030ba8dba906f756967f9e9ca394464a");
  EXPECT_EQ(sum(40, "", 1), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
}

TEST(HubChecksum, OtherEtagsAreNone) {
  EXPECT_TRUE(Checksum(std::string(64, 'f'), 0).known());
  EXPECT_FALSE(Checksum(std::string(64, 'g'), 0).known());
  EXPECT_FALSE(Checksum(std::string(32, 'a'), 0).known());
  EXPECT_FALSE(Checksum("", 0).known());
}

}  // namespace
}  // namespace krait::hub
