// MemoryPool: blocks of memory by size class, kept for reuse when they are freed.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <vector>

namespace krait {

// Where a pool gets its memory from. `allocate` returns null where there is none.
struct MemorySource {
  void* (*allocate)(std::size_t bytes, int device);
  void (*release)(void* block, int device);
  int device = 0;
};

// Tensors hold the pool that their memory comes from alive, so they may outlive the context. A block of a
// GPU that is given back is taken again by work on the same stream alone, which runs after what used it.
class MemoryPool {
 public:
  explicit MemoryPool(MemorySource source) : source_(source) {}
  ~MemoryPool() { trim(); }
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // Null where memory is used up, even after trim().
  void* take(std::size_t bytes);
  void give(void* block, std::size_t bytes);
  // Returns free blocks to the source.
  void trim();
  // Bytes in use or kept.
  [[nodiscard]] std::size_t held() const;

 private:
  MemorySource source_;
  mutable std::mutex mutex_;
  std::map<std::size_t, std::vector<void*>> free_;
  std::size_t held_ = 0;
};

// aligned_alloc to 64 bytes.
[[nodiscard]] MemorySource host_memory();

}  // namespace krait
