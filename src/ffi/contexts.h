// Contexts for callers that have none: one is leased for the time of a call, by device and stream.
#pragma once

#include <cstdint>
#include <memory>

#include "krait/core/context.h"

namespace krait::ffi {

// How contexts of this library are made: on the stream that the caller works on (that of the producer of the
// tensors), with the threads of set_threads, and ended by signals (Ctrl-C).
[[nodiscard]] ContextOptions options_for(Device device);

// Threads of each context that is made or leased from now on; 0: one for each processor.
void set_threads(std::int64_t threads);
// `threads` where it is a number that may be asked for, 0 included; throws otherwise.
[[nodiscard]] int checked_threads(std::int64_t threads);
[[nodiscard]] int threads();

// Whether the last work on this thread that was ended has been ended by a signal, which the caller's
// environment then knows of. Asking forgets it.
[[nodiscard]] bool signal_was_raised();

// A context that nobody else uses until the lease ends. Thread-safe. While the caller records a graph, it is
// one of that recording alone, which is kept as long as the process lives: the graph goes on to use its
// memory.
class Lease {
 public:
  explicit Lease(Device device);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  [[nodiscard]] Context& operator*() const { return *context_; }
  [[nodiscard]] Context* operator->() const { return context_.get(); }

 private:
  std::unique_ptr<Context> context_;
  void* stream_;
  std::uint64_t recording_ = 0;
};

}  // namespace krait::ffi
