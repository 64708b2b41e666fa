#include "train/run_directory.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "io/scratch.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

std::int64_t entries_of(const fs::path& path) {
  return std::distance(fs::directory_iterator(path), fs::directory_iterator());
}

TEST(RunDirectory, ComesAndGoesWithItsRun) {
  const io::Scratch scratch;
  const fs::path path = scratch / "runs";
  {
    const RunDirectory directory(path / "one", false);
    EXPECT_TRUE(fs::exists(path / "one" / ".lock"));
    EXPECT_FALSE(directory.holds_run());
  }
  EXPECT_FALSE(fs::exists(path / "one")) << "a directory in which nothing was begun stays";
  {
    const RunDirectory directory(path / "one", false);
    std::ofstream(directory / "settings.json") << "{}";
    EXPECT_TRUE(directory.holds_run());
  }
  EXPECT_TRUE(fs::exists(path / "one" / "settings.json"));
  EXPECT_FALSE(fs::exists(path / "one" / ".lock"));
}

TEST(RunDirectory, NothingIsOverwritten) {
  const io::Scratch scratch;
  fs::create_directory(scratch / "empty");
  { const RunDirectory directory(scratch / "empty", false); }
  EXPECT_TRUE(fs::exists(scratch / "empty")) << "a directory that was there before is gone";
  fs::create_directory(scratch / "run");
  scratch.put("run/settings.json", "{}");
  EXPECT_MESSAGE(RunDirectory(scratch / "run", false), "--resume goes on with the run that is there");
  { const RunDirectory directory(scratch / "run", true); }
  fs::create_directory(scratch / "other");
  scratch.put("other/model.bin", "");
  EXPECT_MESSAGE(RunDirectory(scratch / "other", false), "other: is not empty");
  EXPECT_MESSAGE(RunDirectory(scratch / "other", true), "holds files but no run");
  EXPECT_EQ(entries_of(scratch / "other"), 1) << "the lock was left behind";
  scratch.put("file", "");
  EXPECT_MESSAGE(RunDirectory(scratch / "file", false), "file");
}

TEST(RunDirectory, RemovesWhatAKilledProcessLeft) {
  const io::Scratch scratch;
  scratch.put("settings.json", "{}");
  scratch.put(".krait-12ab.tmp", "half");
  scratch.put(".hidden", "mine");
  { const RunDirectory directory(scratch.path(), true); }
  EXPECT_FALSE(fs::exists(scratch / ".krait-12ab.tmp"));
  EXPECT_TRUE(fs::exists(scratch / ".hidden"));
  // Before its first file was whole, too.
  for (const bool resume : {false, true}) {
    fs::create_directory(scratch / "young");
    scratch.put("young/.krait-12ab.tmp", "half");
    { const RunDirectory directory(scratch / "young", resume); }
    EXPECT_EQ(entries_of(scratch / "young"), 0);
  }
}

TEST(RunDirectory, OneRunAtATime) {
  const io::Scratch scratch;
  const fs::path path = scratch / "run";
  {
    const RunDirectory directory(path, false);
    std::ofstream(directory / "settings.json") << "{}";
    EXPECT_MESSAGE(RunDirectory(path, true), "run: is in use by another run");
    EXPECT_MESSAGE(RunDirectory(path, false), "run: is in use by another run");
    EXPECT_TRUE(fs::exists(path / ".lock")) << "who was refused took the lock away";
  }
  { const RunDirectory directory(path, true); }
}

TEST(RunDirectory, TheLockDiesWithItsProcess) {
  const io::Scratch scratch;
  scratch.put("settings.json", "{}");
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const RunDirectory directory(scratch.path(), true);
    if (::write(ready[1], "x", 1) == 1) ::pause();
    ::_exit(0);
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  EXPECT_MESSAGE(RunDirectory(scratch.path(), true), "in use by another run");
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  EXPECT_TRUE(fs::exists(scratch / ".lock")) << "this test has to find a lock that was left behind";
  const RunDirectory directory(scratch.path(), true);
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST(Lines, AreAddedAndFiltered) {
  const io::Scratch scratch;
  const fs::path path = scratch / "lines";
  const auto keep = [](std::string_view line) { return line != "two"; };
  filter_lines(path, keep);
  EXPECT_FALSE(fs::exists(path));
  LineFile(path).add("one\ntwo\n");
  LineFile(path).add("three\n");
  LineFile(path).add("half");
  filter_lines(path, keep);
  EXPECT_EQ(io::content_of(path), "one\nthree\n");
  EXPECT_MESSAGE(LineFile("/dev/full").add("x"), "/dev/full: cannot be written: No space left on device");
}

}  // namespace
}  // namespace krait
