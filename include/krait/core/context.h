// Context: where and how operators run. Everything that would otherwise be a global lives here:
// threads, scratch memory, logging, determinism, and which path the last operator took. A Context is
// used by one caller at a time; several may exist side by side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "krait/core/tensor.h"

namespace krait {

class ThreadPool;

enum class LogLevel { debug, info, warning };

struct ContextOptions {
  Device device{};
  int threads = 0;                                      // 0: one for each processor the process may use
  bool reference = false;                               // the slow, readable path of every operator
  std::function<void(LogLevel, std::string_view)> log;  // absent: nothing is reported
  std::function<bool()> cancelled;  // asked between pieces of long work; true ends it with Error(interrupted)
};

class Context {
 public:
  explicit Context(ContextOptions options = {});
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  [[nodiscard]] Device device() const { return options_.device; }
  [[nodiscard]] int threads() const { return options_.threads; }
  [[nodiscard]] bool reference() const { return options_.reference; }
  void set_reference(bool on) { options_.reference = on; }

  void log(LogLevel level, std::string_view message) const;
  // Throws Error(interrupted) where the caller has asked to stop.
  void check_cancelled() const;
  void warn(std::string_view message) const { log(LogLevel::warning, message); }

  // Uninitialised memory on the context's device, aligned to 64 bytes, from a pool: freed blocks
  // are kept and reused, so that a loop of equal steps allocates nothing. Throws Error(out_of_memory).
  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype = DType::f32);
  [[nodiscard]] Tensor zeros(const Dims& shape, DType dtype = DType::f32);
  // Bytes held by the pool, in use or cached.
  [[nodiscard]] std::size_t pool_bytes() const;
  // Returns cached blocks to the system.
  void trim();

  // A slot for what an operator keeps between calls, such as compiled primitives: empty at first, filled
  // by the operator, dropped with the context. `key` is the address of a static object of the operator.
  [[nodiscard]] std::shared_ptr<void>& attachment(const void* key) { return attachments_[key]; }

  // The path that the last operator on this context took, such as "selective_scan: simd (AVX2)".
  [[nodiscard]] const std::string& backend() const { return backend_; }
  void set_backend(std::string_view op, std::string_view path);

  // The threads behind parallel loops.
  [[nodiscard]] ThreadPool& workers() const { return *workers_; }

 private:
  class Pool;
  ContextOptions options_;
  std::shared_ptr<Pool> pool_;
  std::unique_ptr<ThreadPool> workers_;
  std::map<const void*, std::shared_ptr<void>> attachments_;
  std::string backend_;
};

// The instruction set that run-time dispatch picks on this machine ("AVX2", "AVX3", "NEON", ...).
[[nodiscard]] std::string_view simd_target();

}  // namespace krait
