#include "krait/core/context.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "core/thread_pool.h"
#include "krait/core/error.h"

namespace krait {

// Free blocks by size class. Tensors hold the pool alive, so they may outlive their context.
class Context::Pool {
 public:
  ~Pool() { trim(); }

  void* take(std::size_t bytes) {
    const std::size_t size = size_class(bytes);
    {
      const std::lock_guard lock(mutex_);
      auto& blocks = free_[size];
      if (!blocks.empty()) {
        void* block = blocks.back();
        blocks.pop_back();
        return block;
      }
      held_ += size;
    }
    void* block = std::aligned_alloc(64, size);
    if (block == nullptr) {
      trim();
      block = std::aligned_alloc(64, size);
    }
    if (block == nullptr) {
      const std::lock_guard lock(mutex_);
      held_ -= size;
    }
    return block;
  }

  void give(void* block, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    free_[size_class(bytes)].push_back(block);
  }

  void trim() {
    const std::lock_guard lock(mutex_);
    for (auto& [size, blocks] : free_) {
      held_ -= size * blocks.size();
      for (void* block : blocks) std::free(block);
      blocks.clear();
    }
  }

  std::size_t held() const {
    const std::lock_guard lock(mutex_);
    return held_;
  }

 private:
  // Four classes for each power of two, so that at most a quarter of a block is waste; one vector of
  // slack beyond what was asked for lets kernels load a whole vector at the last element.
  static std::size_t size_class(std::size_t bytes) {
    const std::size_t wanted = bytes + 64;
    if (wanted <= 256) return 256;
    const std::size_t step = std::bit_floor(wanted - 1) / 4;
    return std::max<std::size_t>((wanted + step - 1) / step * step, 256);
  }

  mutable std::mutex mutex_;
  std::map<std::size_t, std::vector<void*>> free_;
  std::size_t held_ = 0;
};

Context::Context(ContextOptions options) : options_(std::move(options)), pool_(std::make_shared<Pool>()) {
  require(options_.device.kind == Device::Kind::cpu, "device ", name_of(options_.device),
          ": this build of krait has the backend cpu only");
  require(options_.threads >= 0 && options_.threads <= 4096, "threads is ", options_.threads,
          ", expected 0 (all processors) to 4096");
  if (options_.threads == 0) options_.threads = available_processors();
  workers_ = std::make_unique<ThreadPool>(options_.threads);
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
    fail(ErrorKind::out_of_memory, "out of memory: a tensor of shape ", shape, " and dtype ", dtype);
  std::shared_ptr<void> owner(block, [pool = pool_, bytes](void* p) { pool->give(p, bytes); });
  return Tensor::wrap(block, shape, dtype, std::move(owner));
}

Tensor Context::zeros(const Dims& shape, DType dtype) {
  Tensor t = empty(shape, dtype);
  std::memset(t.raw(), 0, t.nbytes());
  return t;
}

std::size_t Context::pool_bytes() const { return pool_->held(); }
void Context::trim() { pool_->trim(); }

void Context::set_backend(std::string_view op, std::string_view path) {
  backend_.assign(op).append(": ").append(path);
}

}  // namespace krait
