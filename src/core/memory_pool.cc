#include "core/memory_pool.h"

#include <algorithm>
#include <bit>
#include <cstdlib>

namespace krait {
namespace {

// Classes of blocks: four for each power of two up to 1 MB, then 32, so that at most a quarter of a small
// block or 3 % of a large one is waste. One vector of slack beyond what was asked for lets kernels load a
// whole vector at the last element.
std::size_t size_class(std::size_t bytes) {
  constexpr std::size_t kLarge = std::size_t{1} << 20;
  const std::size_t wanted = bytes + 64;
  if (wanted <= 256) return 256;
  const std::size_t step = std::bit_floor(wanted - 1) / (wanted > kLarge ? 32 : 4);
  return std::max<std::size_t>((wanted + step - 1) / step * step, 256);
}

}  // namespace

void* MemoryPool::take(std::size_t bytes) {
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
  void* block = source_.allocate(size, source_.device);
  if (block == nullptr) {
    trim();
    block = source_.allocate(size, source_.device);
  }
  if (block == nullptr) {
    const std::lock_guard lock(mutex_);
    held_ -= size;
  }
  return block;
}

void MemoryPool::give(void* block, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  free_[size_class(bytes)].push_back(block);
}

void MemoryPool::trim() {
  const std::lock_guard lock(mutex_);
  for (auto& [size, blocks] : free_) {
    held_ -= size * blocks.size();
    for (void* block : blocks) source_.release(block, source_.device);
    blocks.clear();
  }
}

std::size_t MemoryPool::held() const {
  const std::lock_guard lock(mutex_);
  return held_;
}

MemorySource host_memory() {
  return {.allocate = [](std::size_t bytes, int) { return std::aligned_alloc(64, bytes); },
          .release = [](void* block, int) { std::free(block); }};
}

}  // namespace krait
