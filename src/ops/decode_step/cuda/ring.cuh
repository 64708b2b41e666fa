// The ring of shared memory through which one warp brings everything that a step reads and none of its stages
// writes, in the order of use: weights, and the states of the block's channels. Pieces ("tiles") of any size
// lie one behind the other; where one does not fit in front of the ring's end, it begins anew. Both sides
// know the order of the sizes, so that nothing but "is there" and "is free" passes between them.
#pragma once

#include "core/cuda/mbarrier.cuh"
#include "core/cuda/overlap.cuh"
#include "ops/decode_step/plan.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace krait::decode_detail {

inline constexpr int kSlots = 16;  // tiles on their way or in use at most

class Ring {
 public:
  struct Place {
    int offset;
    unsigned slot;
    unsigned parity;
  };

  // `barriers`: 2 kSlots of 8 bytes. `memory` and they are addresses in shared memory.
  __device__ Ring(unsigned memory, unsigned barriers, int size)
      : memory_(memory), full_(barriers), empty_(barriers + 8 * kSlots), size_(size) {}

  // By one thread, before both sides begin.
  __device__ void begin() const {
    for (unsigned i = 0; i < kSlots; ++i) {
      cuda::begin_barrier(full_ + 8 * i, 1);
      cuda::begin_barrier(empty_ + 8 * i, kWarps);
    }
    cuda::fence_barriers();
  }

  [[nodiscard]] __device__ __forceinline__ Place next(int bytes) {
    const int room = (bytes + 127) / 128 * 128;
    if (head_ + room > size_) head_ = 0;
    const Place place{head_, count_ % kSlots, count_ / kSlots % 2};
    head_ += room;
    ++count_;
    return place;
  }

  [[nodiscard]] __device__ unsigned memory() const { return memory_; }
  [[nodiscard]] __device__ unsigned full(unsigned slot) const { return full_ + 8 * slot; }
  [[nodiscard]] __device__ unsigned empty(unsigned slot) const { return empty_ + 8 * slot; }

 private:
  unsigned memory_;
  unsigned full_;
  unsigned empty_;
  int size_;
  int head_ = 0;
  unsigned count_ = 0;
};

// One warp. Lane i knows what the tile of slot i covers, and waits for its end.
class Producer {
 public:
  __device__ explicit Producer(const Ring& ring) : ring_(ring) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(once_));
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(plain_));
  }

  // `once`: nothing reads it again before the next step has read everything else. By all lanes; 16 bytes
  // divide address and size.
  __device__ __forceinline__ void bring(const void* from, int bytes, bool once = true) {
    const Ring::Place place = ring_.next(bytes);
    const unsigned lane = threadIdx.x % 32;
    if (held_ && (lane == place.slot || (place.offset < end_ && begin_ < place.offset + bytes))) {
      cuda::wait_for_phase(ring_.empty(lane), parity_);
      held_ = false;
    }
    __syncwarp();
    if (lane == place.slot) {
      held_ = true;
      begin_ = place.offset;
      end_ = place.offset + bytes;
      parity_ = place.parity;
    }
    if (lane == 0) {
      cuda::arrive_expecting(ring_.full(place.slot), static_cast<unsigned>(bytes));
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
          "[%0], [%1], %2, [%3], %4;\n" ::"r"(ring_.memory() + static_cast<unsigned>(place.offset)),
          "l"(from), "r"(bytes), "r"(ring_.full(place.slot)), "l"(once ? once_ : plain_)
          : "memory");
    }
  }

  // Rows [first, first + count) of a matrix, `tile` rows at a time.
  template <typename T>
  __device__ __forceinline__ void bring_rows(const void* matrix, int columns, int first, int count, int tile,
                                             bool once = true) {
    const T* from = static_cast<const T*>(matrix) + std::int64_t{first} * columns;
#pragma unroll 1
    for (int row = 0; row < count; row += tile) {
      const int rows = min(tile, count - row);
      bring(from, rows * columns * static_cast<int>(sizeof(T)), once);
      from += std::int64_t{rows} * columns;
    }
  }

  // What threads will read from memory themselves comes closer.
  template <typename T>
  static __device__ __forceinline__ void announce(const T* from, std::int64_t first, int count) {
    if (from != nullptr && count > 0) announce_bytes(from + first, count * static_cast<int>(sizeof(T)));
  }
  // The same of what all blocks read: 128 bytes by each block.
  static __device__ __forceinline__ void announce_share(const float* from, int count, int block) {
    const int first = block * 32;
    if (from != nullptr && first < count && threadIdx.x % 32 == 0) cuda::prefetch(from + first);
  }

 private:
  // One copy of it: the code of a layer should fit into the caches of instructions.
  static __device__ __noinline__ void announce_bytes(const void* from, int bytes) {
    const auto* const begin = static_cast<const unsigned char*>(from);
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x) % 32 * 128; at < bytes; at += 32 * 128)
      cuda::prefetch(begin + at);
    if (threadIdx.x % 32 == 0) cuda::prefetch(begin + bytes - 1);
  }

  Ring ring_;
  std::uint64_t once_;
  std::uint64_t plain_;
  bool held_ = false;
  int begin_ = 0;
  int end_ = 0;
  unsigned parity_ = 0;
};

}  // namespace krait::decode_detail

#endif
