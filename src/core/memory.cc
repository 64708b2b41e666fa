#include "krait/core/memory.h"

#include <utility>

#include "core/device_backend.h"
#include "core/memory_pool.h"
#include "krait/core/error.h"

namespace krait {
namespace {

bool on_host(const Tensor& t) { return t.device().kind == Device::Kind::cpu; }

}  // namespace

Tensor Memory::empty(const Dims& shape, DType dtype) const {
  if (!pool_) return Tensor::empty(shape, dtype);
  const std::int64_t count = numel_of(shape);
  std::size_t bytes = 0;
  const bool overflow = __builtin_mul_overflow(static_cast<std::size_t>(count), size_of(dtype), &bytes) ||
                        bytes > (std::size_t{1} << 62);
  void* block = overflow ? nullptr : pool_->take(bytes);
  if (block == nullptr)
    fail(ErrorKind::out_of_memory, "out of memory: a tensor of shape ", shape, " and dtype ", dtype,
         backend_ ? concat(" on ", name_of(device_), " (", backend_->describe(), ')') : "");
  // The stream must outlive its blocks.
  std::shared_ptr<void> owner(block,
                              [pool = pool_, backend = backend_, bytes](void* p) { pool->give(p, bytes); });
  return Tensor::wrap(block, shape, dtype, std::move(owner), device_);
}

Tensor Memory::zeros(const Dims& shape, DType dtype) const {
  Tensor t = empty(shape, dtype);
  fill(t, 0.0);
  return t;
}

void Memory::copy(const Tensor& from, const Tensor& to) const {
  require(from.defined() && to.defined(), "copy with an absent tensor");
  for (const Tensor* t : {&from, &to})
    require(on_host(*t) || t->device() == device_, "copy: a tensor is on ", name_of(t->device()),
            ", expected ", name_of(device_), backend_ ? " or the host" : "");
  if (on_host(from) && on_host(to)) return to.copy_from(from);
  backend_->copy(from, to);
}

void Memory::fill(const Tensor& t, double value) const {
  if (on_host(t)) return t.fill(value);
  require(t.device() == device_, "fill: a tensor is on ", name_of(t.device()), ", expected ",
          name_of(device_));
  backend_->fill(t, value);
}

Tensor Memory::clone(const Tensor& t) const {
  Tensor result = empty(t.shape(), t.dtype());
  copy(t, result);
  return result;
}

Tensor Memory::to(const Tensor& t, DType dtype) const {
  if (t.dtype() == dtype) return t;
  Tensor result = empty(t.shape(), dtype);
  copy(t, result);
  return result;
}

Tensor Memory::contiguous(const Tensor& t) const { return t.is_contiguous() ? t : clone(t); }

Tensor Memory::to_device(const Tensor& t) const { return !t || t.device() == device_ ? t : clone(t); }

Tensor Memory::to_host(const Tensor& t) const {
  if (!t || on_host(t)) return t;
  Tensor result = Tensor::empty(t.shape(), t.dtype());
  copy(t, result);
  return result;
}

}  // namespace krait
