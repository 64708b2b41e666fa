// Context: where and how operators run. Everything that would otherwise be a global lives here:
// threads, scratch memory, logging, determinism, and which path the last operator took. A Context is
// used by one caller at a time; several may exist side by side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "krait/core/memory.h"
#include "krait/core/tensor.h"

namespace krait {

class ThreadPool;

enum class LogLevel { debug, info, warning };

struct ContextOptions {
  Device device{};
  void* stream = nullptr;  // on a GPU: the cudaStream_t that all work goes to; null: a stream of its own
  bool profile = false;    // on a GPU: measure each kernel (Context::profile)
  int threads = 0;         // 0: one for each processor the process may use
  bool reference = false;  // the slow, readable path of every operator
  std::function<void(LogLevel, std::string_view)> log;  // absent: nothing is reported
  std::function<bool()> cancelled;  // asked between pieces of long work; true ends it with Error(interrupted)
};

// What the kernels of one name took on a GPU.
struct KernelTime {
  std::string name;
  std::int64_t count = 0;
  double seconds = 0.0;
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

  // Memory of the context's device, from a pool: freed blocks are kept and reused, so that a loop of equal
  // steps allocates nothing. See Memory for each call.
  [[nodiscard]] const Memory& memory() const { return memory_; }
  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype = DType::f32) {
    return memory_.empty(shape, dtype);
  }
  [[nodiscard]] Tensor zeros(const Dims& shape, DType dtype = DType::f32) {
    return memory_.zeros(shape, dtype);
  }
  void copy(const Tensor& from, const Tensor& to) const { memory_.copy(from, to); }
  void fill(const Tensor& t, double value) const { memory_.fill(t, value); }
  [[nodiscard]] Tensor clone(const Tensor& t) { return memory_.clone(t); }
  [[nodiscard]] Tensor to(const Tensor& t, DType dtype) { return memory_.to(t, dtype); }
  [[nodiscard]] Tensor contiguous(const Tensor& t) { return memory_.contiguous(t); }
  [[nodiscard]] Tensor to_device(const Tensor& t) { return memory_.to_device(t); }
  [[nodiscard]] Tensor to_host(const Tensor& t) const { return memory_.to_host(t); }

  // Begins to bring `t` to the host. The result waits for it, and not for what is queued meanwhile, and gives
  // what it held when this was called.
  [[nodiscard]] std::function<Tensor()> fetch(const Tensor& t) const;

  // On a GPU all work of a context is queued on one stream, and calls return before it has ended.
  [[nodiscard]] bool on_gpu() const { return options_.device.kind != Device::Kind::cpu; }
  [[nodiscard]] void* stream() const;  // cudaStream_t; null on the CPU
  // Waits for all that was queued; throws what has failed since.
  void synchronize() const;

  [[nodiscard]] bool profiling() const { return options_.profile && on_gpu(); }
  // Of all kernels since the last call, the longest first; waits for them.
  [[nodiscard]] std::vector<KernelTime> profile() const;

  // What `work` queues on the stream, as one graph that the result launches again (GPU only). Nothing runs
  // meanwhile, so `work` must read no results, and must have run once before in the same shapes. Memory that
  // it takes and gives back stays the graph's own: tensors that outlive `work` belong in front of it.
  [[nodiscard]] std::function<void()> record(const std::function<void()>& work);

  // Bytes held by the pool, in use or cached.
  [[nodiscard]] std::size_t pool_bytes() const;
  // Returns cached blocks to the system.
  void trim();

  // A slot for what an operator keeps between calls, such as compiled primitives: empty at first, filled
  // by the operator, dropped with the context. `key` is the address of a static object of the operator.
  [[nodiscard]] std::shared_ptr<void>& attachment(const void* key);

  // The path that the last operator on this context took, such as "selective_scan: simd (AVX2)".
  [[nodiscard]] const std::string& backend() const { return backend_; }
  void set_backend(std::string_view op, std::string_view path);

  // Null on the CPU.
  [[nodiscard]] DeviceBackend* device_backend() const { return memory_.backend_.get(); }

  // The threads behind parallel loops.
  [[nodiscard]] ThreadPool& workers() const { return *workers_; }

 private:
  ContextOptions options_;
  Memory memory_;
  std::unique_ptr<ThreadPool> workers_;
  std::map<const void*, std::shared_ptr<void>> attachments_;
  std::string backend_;
};

// While one lives, kernels of a GPU may start before those in front of them have ended, and read meanwhile
// what an operator takes as weights, biases and indices: none of these may be written by what is queued while
// it lives. What is computed stays the same. Nothing on the CPU.
class OverlappingKernels {
 public:
  explicit OverlappingKernels(Context& ctx);
  ~OverlappingKernels();
  OverlappingKernels(const OverlappingKernels&) = delete;
  OverlappingKernels& operator=(const OverlappingKernels&) = delete;

 private:
  DeviceBackend* backend_;  // null where there is nothing to end
};

// The device called "cpu", "cuda", "cuda:N" or "auto" (a GPU where the build and the machine have one).
// Throws for any other name; whether the device is there is seen when a Context is made.
[[nodiscard]] Device parse_device(std::string_view name);

// Throws where a tensor is elsewhere than the context works. Index tensors of sequences (seq_idx, cu_seqlens)
// are not among those named: they may be on the host.
struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};
void require_on_device(const Context& ctx, std::string_view op, std::initializer_list<NamedTensor> tensors);

// The instruction set that run-time dispatch picks on this machine ("AVX2", "AVX3", "NEON", ...).
[[nodiscard]] std::string_view simd_target();

}  // namespace krait
