// DeviceBackend: what a Context asks of the device that its tensors live on.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/memory_pool.h"
#include "krait/core/context.h"

namespace krait {

class DeviceBackend {
 public:
  virtual ~DeviceBackend() = default;

  [[nodiscard]] virtual MemorySource memory() const = 0;
  // "NVIDIA H100 80GB HBM3, 85.0 GB of which 84.1 GB are free": for messages.
  [[nodiscard]] virtual std::string describe() const = 0;
  [[nodiscard]] virtual void* stream() const = 0;
  virtual void synchronize() = 0;
  // Element by element with conversion; either side may be on the host. See Memory::copy.
  virtual void copy(const Tensor& from, const Tensor& to) = 0;
  virtual void fill(const Tensor& t, double value) = 0;
  // See Context::fetch; `t` is contiguous and on the device.
  virtual std::function<Tensor()> fetch(const Tensor& t) = 0;
  // The time of what is queued between the two calls is measured under `name`, which must stay valid.
  virtual void begin_kernel(std::string_view name) = 0;
  virtual void end_kernel() = 0;
  virtual std::vector<KernelTime> take_profile() = 0;
  // Records what `work` launches; the result launches all of it again.
  virtual std::function<void()> record(const std::function<void()>& work) = 0;

  // Kernels that are made for it may start before the kernel in front of them has ended, where that was
  // launched since the overlap began: see OverlappingKernels.
  void set_overlapping(bool on) {
    overlapping_ = on;
    behind_kernel_ = false;
  }
  [[nodiscard]] bool overlapping() const { return overlapping_; }
  [[nodiscard]] bool may_overlap() const { return overlapping_ && behind_kernel_; }
  // What was queued last is a kernel, or something else, which overlaps with nothing.
  void queued(bool kernel) { behind_kernel_ = kernel; }

 private:
  bool overlapping_ = false;
  bool behind_kernel_ = false;
};

// Throws where there is no such device, its driver is too old, or the build has no CUDA. `stream` is a
// cudaStream_t, null for one of its own.
std::shared_ptr<DeviceBackend> make_cuda_backend(int index, void* stream);
// 0 where the build has no CUDA or the machine no device.
int cuda_device_count();

}  // namespace krait
