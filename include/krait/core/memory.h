// Memory: where tensors of a device are made, and copies to and from them. A handle that is cheap to copy:
// what outlives the Context that it came from (states of sequences, weights) keeps one. The default one is
// the host's.
#pragma once

#include <cstddef>
#include <memory>

#include "krait/core/tensor.h"

namespace krait {

class DeviceBackend;
class MemoryPool;

class Memory {
 public:
  Memory() = default;

  [[nodiscard]] Device device() const { return device_; }
  [[nodiscard]] bool on_gpu() const { return device_.kind != Device::Kind::cpu; }

  // Uninitialised, aligned to 64 bytes (256 on a GPU). Throws Error(out_of_memory).
  [[nodiscard]] Tensor empty(const Dims& shape, DType dtype = DType::f32) const;
  [[nodiscard]] Tensor zeros(const Dims& shape, DType dtype = DType::f32) const;

  // Element by element with conversion, any strides, between the host and the device in any direction.
  // A source on the host may change when this returns; a destination there has its values.
  void copy(const Tensor& from, const Tensor& to) const;
  void fill(const Tensor& t, double value) const;
  // A contiguous copy in this memory.
  [[nodiscard]] Tensor clone(const Tensor& t) const;
  // `t` itself where nothing has to change.
  [[nodiscard]] Tensor to(const Tensor& t, DType dtype) const;
  [[nodiscard]] Tensor contiguous(const Tensor& t) const;
  [[nodiscard]] Tensor to_device(const Tensor& t) const;
  [[nodiscard]] Tensor to_host(const Tensor& t) const;

 private:
  friend class Context;
  Device device_;
  std::shared_ptr<DeviceBackend> backend_;  // null on the host
  std::shared_ptr<MemoryPool> pool_;        // null: blocks come from the system one by one
};

}  // namespace krait
