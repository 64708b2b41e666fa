// Tiles in panels (core/cuda/wgmma.cuh) as the backward on products of warpgroups has them: how threads copy
// them, and how sums become tiles.
#pragma once

#include <cstdint>

#include "core/cuda/wgmma.cuh"
#include "ops/ssd/cuda/chunks.cuh"

namespace krait::ssd_detail {

// kTokens rows, or as many channels.
using Panels = cuda::PanelTile<kTokens>;

// As load_tile, by the kThreads threads numbered `thread`: rows of tokens [begin, begin + kTokens) of the
// segment, `columns` of them, the rest of kColumns 0.
template <int kColumns, int kThreads, typename T>
__device__ __forceinline__ void load_panels(unsigned tile, const T* from, std::int64_t token_stride,
                                            std::int64_t columns, const Segments& segments,
                                            const Segment& segment, std::int64_t begin, int thread) {
  constexpr int kVectors = kColumns / 8;
  constexpr int kRows = kThreads / kVectors;  // at a time
  static_assert(kRows % 8 == 0, "the vectors of a thread lie alike in their rows");
  const int first = thread / kVectors;
  const int vector = thread % kVectors;
  const bool inside = vector * 8 < columns;
  const unsigned to = tile + Panels::offset(first, vector);
  from += vector * 8;
  if (segment.listed < 0) {
    const T* source = from + (segment.start + (begin + first) * segment.step) * token_stride;
    const std::int64_t jump = kRows * segment.step * token_stride;
#pragma unroll
    for (int row = 0; row < kTokens; row += kRows) {
      copy_async(to + static_cast<unsigned>(row * 128), source,
                 inside && begin + first + row < segment.count);
      source += jump;
    }
  } else {
#pragma unroll 1
    for (int row = 0; row < kTokens; row += kRows) {
      const std::int64_t i = begin + first + row;
      const bool there = inside && i < segment.count;
      copy_async(to + static_cast<unsigned>(row * 128),
                 there ? from + segments.positions[segment.listed + i] * token_stride : from, there);
    }
  }
}

// A tile that lies in memory as it shall lie in shared memory.
template <int kBytes, int kThreads>
__device__ __forceinline__ void load_image(unsigned tile, const void* from, int thread) {
  static_assert(kBytes % (kThreads * 16) == 0);
  const char* source = static_cast<const char*>(from) + thread * 16;
#pragma unroll
  for (int at = 0; at < kBytes; at += kThreads * 16)
    copy_async(tile + static_cast<unsigned>(thread * 16 + at), source + at, true);
}

#ifdef KRAIT_WGMMA

// Four 8 x 8 matrices to shared memory: the reverse of load_matrices<false>.
__device__ __forceinline__ void store_matrices(unsigned address, unsigned a, unsigned b, unsigned c,
                                               unsigned d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The warp's 16 rows of a warpgroup's sums, from `row` on, into a tile.
template <typename T, int kTiles>
__device__ __forceinline__ void store_sums(unsigned tile, int row, const float (&d)[kTiles][4], int lane) {
#pragma unroll
  for (int n = 0; n < kTiles; n += 2)
    store_matrices(operand_address<64>(tile + static_cast<unsigned>(n / 8 * Panels::kPanel), row, n % 8,
                                       lane % 16, lane / 16),
                   pack<T>(d[n][0], d[n][1]), pack<T>(d[n][2], d[n][3]), pack<T>(d[n + 1][0], d[n + 1][1]),
                   pack<T>(d[n + 1][2], d[n + 1][3]));
}

// Bytes from global to shared memory, multiples of 16 as both addresses are; announced to `barrier`
// (core/cuda/mbarrier.cuh) by whoever calls this.
__device__ __forceinline__ void copy_in_async(unsigned to, const void* from, int bytes, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Bytes from shared to global memory that run while the thread goes on, in a group of their own; both
// addresses and `bytes` are multiples of 16. The source was written before fence_shared.
__device__ __forceinline__ void copy_out_async(void* to, unsigned from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies_out() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
// All but the kReading latest groups of the thread's copies have read their sources.
template <int kReading>
__device__ __forceinline__ void wait_for_sources() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kReading) : "memory");
}
__device__ __forceinline__ void wait_for_copies_out() {
  asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
}

#endif

}  // namespace krait::ssd_detail
