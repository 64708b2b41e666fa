#include "krait/io/atomic_file.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "io/scratch.h"

namespace krait::io {
namespace {

TEST(AtomicFile, AppearsOnCommit) {
  const Scratch scratch;
  {
    AtomicFile file(scratch / "a");
    file.write("one ");
    file.write(std::as_bytes(std::span("two", 3)));
    EXPECT_FALSE(std::filesystem::exists(scratch / "a"));
    file.commit();
    EXPECT_MESSAGE((file.write("more"), 0), "after it was committed");
    EXPECT_MESSAGE((file.commit(), 0), "committed twice");
  }
  EXPECT_EQ(content_of(scratch / "a"), "one two");
  EXPECT_EQ(scratch.count(), 1U);
}

TEST(AtomicFile, OverwritesWhatItWrote) {
  const Scratch scratch;
  AtomicFile file(scratch / "a");
  file.write("____ and text");
  file.overwrite(1, std::as_bytes(std::span("head", 4)));
  file.write(", more");
  file.commit();
  EXPECT_EQ(content_of(scratch / "a"), "_headand text, more");
  EXPECT_MESSAGE(file.overwrite(0, std::as_bytes(std::span("x", 1))), "after it was committed");
}

TEST(AtomicFile, LeavesNothingWithoutCommit) {
  const Scratch scratch;
  scratch.put("a", "old");
  {
    AtomicFile file(scratch / "a");
    file.write("new");
  }
  EXPECT_EQ(content_of(scratch / "a"), "old");
  EXPECT_EQ(scratch.count(), 1U);
}

TEST(AtomicFile, ReplacesAndKeepsPermissions) {
  const Scratch scratch;
  const auto path = scratch.put("a", "old and longer");
  ::chmod(path.c_str(), 0640);
  write_file(path, "new");
  EXPECT_EQ(content_of(path), "new");
  struct stat status {};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777U, 0640U);
}

TEST(AtomicFile, ReplacesALinkNotItsTarget) {
  const Scratch scratch;
  scratch.put("target", "old");
  std::filesystem::create_symlink("target", scratch / "link");
  write_file(scratch / "link", "new");
  EXPECT_EQ(content_of(scratch / "target"), "old");
  EXPECT_EQ(content_of(scratch / "link"), "new");
}

TEST(AtomicFile, TakesTheLongestNames) {
  const Scratch scratch;
  const std::string name(255, 'n');
  write_file(scratch / name, "x");
  EXPECT_EQ(content_of(scratch / name), "x");
}

TEST(AtomicFile, RefusesWhatItCannotReplace) {
  const Scratch scratch;
  EXPECT_MESSAGE((write_file(scratch.path(), ""), 0), "is a directory, expected a file");
  EXPECT_MESSAGE((write_file(scratch / "", ""), 0), "is a directory, expected the name of a file");
  EXPECT_MESSAGE((write_file("/dev/null", ""), 0), "/dev/null: is a device or pipe");
  EXPECT_MESSAGE((write_file(scratch / "no/such", ""), 0), "no/such: cannot be created: No such file");
  EXPECT_EQ(scratch.count(), 0U);
}

// A limit on the size of files fails writes as a full disk does: first a short one, then an error.
TEST(AtomicFile, FullDiskLeavesTheOldFile) {
  const Scratch scratch;
  scratch.put("a", "old");
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  auto* const handler = ::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{.rlim_cur = 1000, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string message =
      message_of([&] { return write_file(scratch / "a", std::string(5000, 'x')), 0; });
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  ::signal(SIGXFSZ, handler);
  EXPECT_NE(message.find("a: cannot be written: File too large"), std::string::npos) << message;
  EXPECT_EQ(content_of(scratch / "a"), "old");
  EXPECT_EQ(scratch.count(), 1U);
}

}  // namespace
}  // namespace krait::io
