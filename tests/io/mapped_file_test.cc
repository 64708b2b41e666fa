#include "krait/io/mapped_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/scratch.h"

namespace krait::io {
namespace {

TEST(MappedFile, SeesTheBytes) {
  const Scratch scratch;
  const auto file = MappedFile::open(scratch.put("a", "hello"));
  ASSERT_EQ(file->bytes().size(), 5U);
  EXPECT_EQ(std::memcmp(file->bytes().data(), "hello", 5), 0);
  EXPECT_EQ(file->text(), "hello");
  EXPECT_EQ(file->path(), scratch / "a");
  file->advise_willneed();
}

TEST(MappedFile, MayBeEmpty) {
  const Scratch scratch;
  const auto file = MappedFile::open(scratch.put("a", ""));
  EXPECT_TRUE(file->bytes().empty());
  file->advise_willneed();
}

TEST(ReadFile, GivesTheWholeFile) {
  const Scratch scratch;
  EXPECT_EQ(read_file(scratch.put("a", std::string("one\0two\n", 8))), std::string("one\0two\n", 8));
  EXPECT_EQ(read_file(scratch.put("b", "")), "");
  EXPECT_MESSAGE((void)read_file(scratch / "none"), "none: cannot be opened: No such file");
}

TEST(ReadFile, RefusesMoreThanTheMost) {
  const Scratch scratch;
  const auto path = scratch.put("a", "hello");
  EXPECT_EQ(read_file(path, 5), "hello");
  EXPECT_MESSAGE((void)read_file(path, 4), "a: 5 bytes, expected at most 4");
}

TEST(MappedFile, OutlivesItsName) {
  const Scratch scratch;
  const auto file = MappedFile::open(scratch.put("a", "hello"));
  std::filesystem::remove(scratch / "a");
  EXPECT_EQ(std::to_integer<char>(file->bytes()[4]), 'o');
}

TEST(MappedFile, RefusesWhatIsNoFile) {
  const Scratch scratch;
  EXPECT_MESSAGE(MappedFile::open(scratch.path()), "is a directory, expected a file");
  EXPECT_MESSAGE(MappedFile::open(scratch / "none"), "none: cannot be opened: No such file");
  EXPECT_MESSAGE(MappedFile::open("/dev/zero"), "is a device or pipe");
  // Must not wait for a writer.
  ASSERT_EQ(::mkfifo((scratch / "pipe").c_str(), 0600), 0);
  EXPECT_MESSAGE(MappedFile::open(scratch / "pipe"), "is a device or pipe");
  std::filesystem::create_symlink("gone", scratch / "link");
  EXPECT_MESSAGE(MappedFile::open(scratch / "link"), "link: a symbolic link to a file that does not exist");
  try {
    (void)MappedFile::open(scratch / "none");
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::not_found);
  }
}

TEST(MappedFile, RefusesUnreadable) {
  const Scratch scratch;
  const auto path = scratch.put("a", "secret");
  ::chmod(path.c_str(), 0);
  // Root may read everything, so it becomes nobody for a moment.
  const bool root = ::geteuid() == 0;
  if (root) {
    ASSERT_EQ(::seteuid(65534), 0);
  }
  EXPECT_MESSAGE(MappedFile::open(path), "cannot be opened: Permission denied");
  if (root) {
    ASSERT_EQ(::seteuid(0), 0);
  }
}

}  // namespace
}  // namespace krait::io
