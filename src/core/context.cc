#include "krait/core/context.h"

#include <charconv>
#include <utility>

#include "core/device_backend.h"
#include "core/memory_pool.h"
#include "core/thread_pool.h"
#include "krait/core/error.h"

namespace krait {

Context::Context(ContextOptions options) : options_(std::move(options)) {
  require(options_.threads >= 0 && options_.threads <= 4096, "threads is ", options_.threads,
          ", expected 0 (all processors) to 4096");
  if (options_.threads == 0) options_.threads = available_processors();
  workers_ = std::make_unique<ThreadPool>(options_.threads);
  if (on_gpu()) {
    require(!options_.reference, "device ", name_of(options_.device),
            ": the reference paths run on the CPU, expected device cpu");
    backend_of_device_ = make_cuda_backend(options_.device.index, options_.stream);
  }
  pool_ = std::make_shared<MemoryPool>(on_gpu() ? backend_of_device_->memory() : host_memory());
}

Context::~Context() = default;

void Context::log(LogLevel level, std::string_view message) const {
  if (options_.log) options_.log(level, message);
}

void Context::check_cancelled() const {
  if (options_.cancelled && options_.cancelled()) fail(ErrorKind::interrupted, "interrupted");
}

Tensor Context::empty(const Dims& shape, DType dtype) {
  const std::int64_t count = numel_of(shape);
  std::size_t bytes = 0;
  const bool overflow = __builtin_mul_overflow(static_cast<std::size_t>(count), size_of(dtype), &bytes) ||
                        bytes > (std::size_t{1} << 62);
  void* block = overflow ? nullptr : pool_->take(bytes);
  if (block == nullptr)
    fail(ErrorKind::out_of_memory, "out of memory: a tensor of shape ", shape, " and dtype ", dtype,
         on_gpu() ? concat(" on ", name_of(device()), " (", backend_of_device_->describe(), ')') : "");
  std::shared_ptr<void> owner(block, [pool = pool_, bytes](void* p) { pool->give(p, bytes); });
  return Tensor::wrap(block, shape, dtype, std::move(owner), device());
}

Tensor Context::zeros(const Dims& shape, DType dtype) {
  Tensor t = empty(shape, dtype);
  fill(t, 0.0);
  return t;
}

void* Context::stream() const { return on_gpu() ? backend_of_device_->stream() : nullptr; }

void Context::synchronize() const {
  if (on_gpu()) backend_of_device_->synchronize();
}

void Context::copy(const Tensor& from, const Tensor& to) const {
  require(from.defined() && to.defined(), "copy with an absent tensor");
  for (const Tensor* t : {&from, &to})
    require(t->device().kind == Device::Kind::cpu || t->device() == device(), "copy: a tensor is on ",
            name_of(t->device()), ", expected ", name_of(device()), on_gpu() ? " or the host" : "");
  if (from.device().kind == Device::Kind::cpu && to.device().kind == Device::Kind::cpu)
    return to.copy_from(from);
  backend_of_device_->copy(from, to);
}

void Context::fill(const Tensor& t, double value) const {
  if (t.device().kind == Device::Kind::cpu) return t.fill(value);
  require(t.device() == device(), "fill: a tensor is on ", name_of(t.device()), ", expected ",
          name_of(device()));
  backend_of_device_->fill(t, value);
}

Tensor Context::clone(const Tensor& t) {
  Tensor result = empty(t.shape(), t.dtype());
  copy(t, result);
  return result;
}

Tensor Context::to(const Tensor& t, DType dtype) {
  if (t.dtype() == dtype) return t;
  Tensor result = empty(t.shape(), dtype);
  copy(t, result);
  return result;
}

Tensor Context::contiguous(const Tensor& t) { return t.is_contiguous() ? t : clone(t); }

Tensor Context::to_device(const Tensor& t) { return !t || t.device() == device() ? t : clone(t); }

Tensor Context::to_host(const Tensor& t) const {
  if (!t || t.device().kind == Device::Kind::cpu) return t;
  Tensor result = Tensor::empty(t.shape(), t.dtype());
  copy(t, result);
  return result;
}

std::function<void()> Context::record(const std::function<void()>& work) {
  require(on_gpu(), "only work on a GPU can be recorded, not on ", name_of(device()));
  // A pool for the graph alone: its addresses are in the graph, and nothing else may be given them.
  const auto outside = pool_;
  pool_ = std::make_shared<MemoryPool>(backend_of_device_->memory());
  const auto own = pool_;
  try {
    auto launch = backend_of_device_->record(work);
    pool_ = outside;
    return [launch = std::move(launch), own] { launch(); };
  } catch (...) {
    pool_ = outside;
    throw;
  }
}

std::size_t Context::pool_bytes() const { return pool_->held(); }
void Context::trim() { pool_->trim(); }

void Context::set_backend(std::string_view op, std::string_view path) {
  backend_.assign(op).append(": ").append(path);
}

Device parse_device(std::string_view name) {
  if (name == "cpu") return {};
  if (name == "auto") return cuda_device_count() > 0 ? Device{Device::Kind::cuda, 0} : Device{};
  if (name == "cuda") return {Device::Kind::cuda, 0};
  int index = -1;
  if (name.starts_with("cuda:")) {
    const char* end = name.data() + name.size();
    const auto [at, error] = std::from_chars(name.data() + 5, end, index);
    if (error != std::errc() || at != end) index = -1;
  }
  require(index >= 0, "device is '", name, "', expected cpu, cuda, cuda:N or auto");
  return {Device::Kind::cuda, index};
}

void require_on_device(const Context& ctx, std::string_view op, std::initializer_list<NamedTensor> tensors) {
  for (const auto& [name, tensor] : tensors)
    require(!tensor || tensor.device() == ctx.device(), "[", op, "] ", name, " is on ",
            name_of(tensor.device()), ", expected ", name_of(ctx.device()));
}

}  // namespace krait
