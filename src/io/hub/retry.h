// Trying again: which failures are worth it, how long to wait, and when to give up.
#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "krait/core/error.h"
#include "krait/io/hub.h"

namespace krait::hub {

// A failure that may pass: a broken connection, a server that is busy (5xx, 429).
class TransientError : public Error {
 public:
  explicit TransientError(const std::string& message, std::optional<std::chrono::seconds> retry_after = {})
      : Error(ErrorKind::network, message), retry_after_(retry_after) {}
  // How long the server asked to wait (Retry-After).
  [[nodiscard]] std::optional<std::chrono::seconds> retry_after() const { return retry_after_; }

 private:
  std::optional<std::chrono::seconds> retry_after_;
};

// Throws Error(interrupted) if the caller wants to stop.
void check_cancelled(const Options& options);
// Sleeps, and throws Error(interrupted) as soon as the caller wants to stop.
void wait(const Options& options, std::chrono::milliseconds time);

class Retry {
 public:
  Retry(const Options& options, int retries) : options_(options), retries_(retries) {}

  // Waits, then returns for another try; throws Error(network) when there is none left or the server
  // asks for more patience than Options::longest_wait.
  void after(const TransientError& error);
  // The last try brought something: start counting anew.
  void reset() { tried_ = 0; }

 private:
  const Options& options_;
  int retries_;
  int tried_ = 0;
};

}  // namespace krait::hub
