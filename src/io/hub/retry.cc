#include "io/hub/retry.h"

#include <algorithm>
#include <thread>

namespace krait::hub {

void check_cancelled(const Options& options) {
  if (options.cancelled && options.cancelled()) fail(ErrorKind::interrupted, "the download was stopped");
}

void wait(const Options& options, std::chrono::milliseconds time) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::milliseconds kStep{50};
  const Clock::time_point end = Clock::now() + time;
  for (;;) {
    check_cancelled(options);
    const auto left = end - Clock::now();
    if (left <= Clock::duration::zero()) return;
    std::this_thread::sleep_for(std::min<Clock::duration>(left, kStep));
  }
}

void Retry::after(const TransientError& error) {
  if (error.retry_after() > options_.longest_wait)
    fail(ErrorKind::network, error.what(), "; it asks to wait ", error.retry_after()->count(),
         " seconds: try again later");
  if (tried_ >= retries_) {
    if (tried_ == 0) throw Error(ErrorKind::network, error.what());
    fail(ErrorKind::network, error.what(), " (tried ", tried_ + 1, " times)");
  }
  const std::chrono::milliseconds pause = error.retry_after()
                                              ? std::chrono::milliseconds(*error.retry_after())
                                              : options_.retry_delay * (1 << std::min(tried_, 4));
  ++tried_;
  if (options_.log) {
    const double seconds = std::chrono::duration<double>(pause).count();
    options_.log(LogLevel::info, concat(error.what(), "; trying again in ", seconds, " s"));
  }
  wait(options_, pause);
}

}  // namespace krait::hub
