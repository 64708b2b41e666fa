#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <cstdint>
#include <string>

#include "krait/io/hub.h"

namespace krait::hub {
namespace {

// What can be read from `descriptor` now.
std::string read_all(int descriptor) {
  ::fcntl(descriptor, F_SETFL, O_NONBLOCK);
  std::string text;
  char piece[4096];
  for (;;) {
    const ssize_t got = ::read(descriptor, piece, sizeof piece);
    if (got <= 0) return text;
    text.append(piece, static_cast<std::size_t>(got));
  }
}

constexpr Progress kHalf{
    .file = "model.safetensors", .bytes_done = 130'000'000, .bytes_total = 260'000'000, .files_total = 2};
constexpr Progress kWhole{.file = "model.safetensors",
                          .bytes_done = 260'000'000,
                          .bytes_total = 260'000'000,
                          .complete = true,
                          .files_done = 1,
                          .files_total = 2};

TEST(HubProgressBar, OneLineAFileWhereThereIsNoTerminal) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  {
    ProgressBar bar(ends[1]);
    bar(kHalf);
    bar(kWhole);
    bar({.file = "config.json",
         .bytes_done = 0,
         .bytes_total = 0,
         .complete = true,
         .files_done = 2,
         .files_total = 2});
    bar({.file = "broken.bin", .bytes_done = 1, .bytes_total = 2, .files_done = 2, .files_total = 3});
  }
  EXPECT_EQ(read_all(ends[0]), "model.safetensors: 260 MB (1 of 2)\nconfig.json: 0 B (2 of 2)\n");
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(HubProgressBar, ABarOnATerminal) {
  const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_GE(terminal, 0);
  ASSERT_EQ(::grantpt(terminal), 0);
  ASSERT_EQ(::unlockpt(terminal), 0);
  const int screen = ::open(::ptsname(terminal), O_RDWR | O_NOCTTY);
  ASSERT_GE(screen, 0);
  termios mode{};
  ASSERT_EQ(::tcgetattr(screen, &mode), 0);
  ::cfmakeraw(&mode);  // line breaks stay as they are
  ASSERT_EQ(::tcsetattr(screen, TCSANOW, &mode), 0);
  for (const std::uint16_t columns :
       {std::uint16_t{100}, std::uint16_t{40}, std::uint16_t{10}, std::uint16_t{1}, std::uint16_t{100}}) {
    SCOPED_TRACE(columns);
    winsize size{.ws_row = 24, .ws_col = columns, .ws_xpixel = 0, .ws_ypixel = 0};
    ASSERT_EQ(::ioctl(screen, TIOCSWINSZ, &size), 0);
    {
      ProgressBar bar(screen);
      bar(kHalf);
      bar(kHalf);  // too soon after the first to be drawn again
    }
    std::string text = read_all(terminal);
    ASSERT_TRUE(text.starts_with("\r") && text.ends_with("\x1b[K\n")) << text;
    text = text.substr(1, text.size() - 5);
    EXPECT_LT(text.size(), columns);
    EXPECT_EQ(text.find('\r'), std::string::npos) << "drawn twice";
    if (columns == 100) {
      EXPECT_EQ(text, "model.safetensors  [###############---------------]   50%  130 MB of 260 MB");
    }
  }
  {
    ProgressBar bar(screen);
    bar(kHalf);
    bar(kWhole);
    const std::string text = read_all(terminal);
    EXPECT_NE(text.find("100%  260 MB of 260 MB"), std::string::npos) << text;
    EXPECT_NE(text.find("/s  0:00"), std::string::npos) << text;
    EXPECT_TRUE(text.ends_with("\n"));
  }
  EXPECT_EQ(read_all(terminal), "") << "a second line break";
  ::close(screen);
  ::close(terminal);
}

}  // namespace
}  // namespace krait::hub
