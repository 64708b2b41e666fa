// The ring of shared memory through which one warp brings everything that a step reads and none of its stages
// writes, in the order of use: weights, and the states of the block's channels. Tiles of any size lie one
// behind the other; where one does not fit in front of the ring's end, it begins anew. Both sides know the
// order of the sizes, so that nothing but "is there" and "is free" passes between them.
//
// A tile comes in pieces, of which few are on their way at a time: what keeps the memory busy, no more. All
// that is on its way to a multiprocessor stands in one line, and the words for which its stages wait
// (words.cuh) at the end of it.
#pragma once

#include "core/cuda/async_copy.cuh"
#include "core/cuda/mbarrier.cuh"
#include "core/cuda/overlap.cuh"
#include "ops/decode_step/cuda/shared.cuh"
#include "ops/decode_step/plan.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace krait::decode_detail {

inline constexpr int kSlots = 32;  // pieces on their way or in use at most: one for each lane of a warp

class Ring {
 public:
  // A tile: pieces `first` to first + pieces - 1, counted from the beginning.
  struct Place {
    int offset;
    unsigned first;
    unsigned pieces;
  };

  // `barriers`: 2 kSlots of 8 bytes. `memory` and they are addresses in shared memory.
  __device__ Ring(unsigned memory, unsigned barriers, int size, int piece_shift)
      : memory_(memory), full_(barriers), empty_(barriers + 8 * kSlots), size_(size), shift_(piece_shift) {}

  // By one thread, before both sides begin.
  __device__ void begin() const {
    for (unsigned i = 0; i < kSlots; ++i) {
      cuda::begin_barrier(full_ + 8 * i, 1);
      cuda::begin_barrier(empty_ + 8 * i, kWarps);
    }
    cuda::fence_barriers();
  }

  [[nodiscard]] __device__ __forceinline__ Place next(int bytes) {
    const int room = static_cast<int>((static_cast<unsigned>(bytes) + 127U) & ~127U);
    if (head_ + room > size_) head_ = 0;
    const Place place{head_, count_, (static_cast<unsigned>(bytes - 1) >> shift_) + 1U};
    head_ += room;
    count_ += place.pieces;
    return place;
  }

  // Addresses stay in registers (held), by way of 4 bytes of the thread's.
  __device__ void hold(unsigned at) {
    memory_ = held(memory_, at);
    full_ = held(full_, at);
    empty_ = held(empty_, at);
  }
  [[nodiscard]] __device__ unsigned memory() const { return memory_; }
  [[nodiscard]] __device__ int piece() const { return 1 << shift_; }
  [[nodiscard]] __device__ unsigned full(unsigned piece) const { return full_ + piece % kSlots * 8; }
  [[nodiscard]] __device__ unsigned empty(unsigned piece) const { return empty_ + piece % kSlots * 8; }
  [[nodiscard]] static __device__ unsigned parity(unsigned piece) { return piece / kSlots % 2; }

 private:
  unsigned memory_;
  unsigned full_;
  unsigned empty_;
  int size_;
  int shift_;
  int head_ = 0;
  unsigned count_ = 0;
};

// One warp. Lane i knows what the tile of slot i covers, and waits for its end.
class Producer {
 public:
  __device__ Producer(const Ring& ring, int in_flight)
      : ring_(ring), in_flight_(static_cast<unsigned>(in_flight)), once_(cuda::evict_first()) {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(plain_));
  }

  // `once`: nothing reads it again before the next step has read everything else. By all lanes; 16 bytes
  // divide address and size.
  __device__ __forceinline__ void bring(const void* from, int bytes, bool once = true) {
    const Ring::Place place = ring_.next(bytes);
    const unsigned lane = threadIdx.x % 32;
#pragma unroll 1
    for (unsigned i = 0; i < place.pieces; ++i) {
      const unsigned piece = place.first + i;
      const int begin = static_cast<int>(i) * ring_.piece();
      const int size = min(ring_.piece(), bytes - begin);
      const int to = place.offset + begin;
      if (held_ && (lane == piece % kSlots || (to < end_ && begin_ < to + size))) {
        cuda::wait_for_phase(ring_.empty(lane), parity_);
        held_ = false;
      }
      if (lane == 0 && piece >= in_flight_)
        cuda::wait_for_phase(ring_.full(piece - in_flight_), Ring::parity(piece - in_flight_));
      __syncwarp();
      if (lane == piece % kSlots) {
        held_ = true;
        begin_ = to;
        end_ = to + size;
        parity_ = Ring::parity(piece);
      }
      if (lane == 0) {
        cuda::arrive_expecting(ring_.full(piece), static_cast<unsigned>(size));
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1], %2, [%3], %4;\n" ::"r"(ring_.memory() + static_cast<unsigned>(to)),
            "l"(static_cast<const unsigned char*>(from) + begin), "r"(size), "r"(ring_.full(piece)),
            "l"(once ? once_ : plain_)
            : "memory");
      }
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
  unsigned in_flight_;  // pieces
  std::uint64_t once_;
  std::uint64_t plain_;
  bool held_ = false;
  int begin_ = 0;
  int end_ = 0;
  unsigned parity_ = 0;
};

}  // namespace krait::decode_detail

#endif
