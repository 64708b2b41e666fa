#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <string>

#include "krait/core/error.h"
#include "krait/io/hub.h"

namespace krait::hub {
namespace {

std::string with_unit(double bytes) {
  constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
  std::size_t unit = 0;
  while (bytes >= 999.5 && unit + 1 < std::size(kUnits)) {
    bytes /= 1000;
    ++unit;
  }
  char text[32];
  std::snprintf(text, sizeof text, unit > 0 && bytes < 99.95 ? "%.1f %s" : "%.0f %s", bytes, kUnits[unit]);
  return text;
}

std::string as_time(double seconds) {
  const auto whole = static_cast<long>(std::min(seconds, 359'999.0));
  char text[32];
  if (whole >= 3600) {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", whole / 3600, whole / 60 % 60, whole % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld", whole / 60, whole % 60);
  }
  return text;
}

int columns_of(int descriptor) {
  winsize size{};
  return ::ioctl(descriptor, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

// "model.safetensors  [######----]  61%  157/258 MB  23.4 MB/s  0:04", no longer than `columns`.
std::string line(const Progress& progress, double rate, int columns) {
  constexpr int kShortestBar = 5;
  constexpr int kLongestBar = 30;
  const double share = progress.bytes_total > 0 ? static_cast<double>(progress.bytes_done) /
                                                      static_cast<double>(progress.bytes_total)
                                                : 1.0;
  char percent[16];
  std::snprintf(percent, sizeof percent, "%3d%%", static_cast<int>(100 * share));
  std::string numbers = concat("  ", percent, "  ", with_unit(static_cast<double>(progress.bytes_done)),
                               " of ", with_unit(static_cast<double>(progress.bytes_total)));
  if (rate > 0) {
    const auto left = static_cast<double>(progress.bytes_total - progress.bytes_done);
    numbers += concat("  ", with_unit(rate), "/s  ", as_time(left / rate));
  }
  std::string text(progress.file);
  const int room = columns - 1 - static_cast<int>(text.size() + numbers.size()) - 4;
  if (room >= kShortestBar) {
    const int cells = std::min(room, kLongestBar);
    const int full = static_cast<int>(share * cells);
    text += "  [" + std::string(static_cast<std::size_t>(full), '#') +
            std::string(static_cast<std::size_t>(cells - full), '-') + "]";
  }
  text += numbers;
  return text.substr(0, static_cast<std::size_t>(std::max(columns - 1, 0)));
}

}  // namespace

ProgressBar::ProgressBar(int descriptor) : descriptor_(descriptor), terminal_(::isatty(descriptor) == 1) {}

ProgressBar::~ProgressBar() {
  if (line_open_) write("\n");
}

void ProgressBar::operator()(const Progress& progress) {
  constexpr std::chrono::milliseconds kBetweenDrawings{100};
  const Clock::time_point now = Clock::now();
  if (progress.file != file_) {
    file_ = progress.file;
    first_bytes_ = progress.bytes_done;
    began_ = now;
    drawn_ = {};
  }
  if (terminal_ && (progress.complete || now - drawn_ >= kBetweenDrawings)) {
    // A server that starts again from the beginning makes the number shrink.
    first_bytes_ = std::min(first_bytes_, progress.bytes_done);
    const double seconds = std::chrono::duration<double>(now - began_).count();
    const double rate = seconds > 0 ? static_cast<double>(progress.bytes_done - first_bytes_) / seconds : 0;
    write("\r" + line(progress, rate, columns_of(descriptor_)) + "\x1b[K");  // and erase what is right of it
    drawn_ = now;
    line_open_ = true;
  }
  if (!progress.complete) return;
  write(terminal_ ? "\n"
                  : concat(progress.file, ": ", with_unit(static_cast<double>(progress.bytes_total)), " (",
                           progress.files_done, " of ", progress.files_total, ")\n"));
  line_open_ = false;
  file_.clear();
}

void ProgressBar::write(std::string_view text) const {
  while (!text.empty()) {
    const ssize_t written = ::write(descriptor_, text.data(), text.size());
    if (written <= 0) return;  // progress is not worth an error
    text.remove_prefix(static_cast<std::size_t>(written));
  }
}

}  // namespace krait::hub
