// Barriers in shared memory (mbarrier), from compute capability 9.0 on: a phase ends when as many arrivals as
// the barrier was begun with have come and the bytes that were announced are there. Waits name the phase's
// parity: 0 for the first, then 1, 0, ...; waiting for parity 1 of a new barrier returns at once.
#pragma once

#include <cstdint>

#include "core/cuda/gpu.h"

namespace krait::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// `barrier` is an address in shared memory, of 8 bytes. By one thread; fence_barriers and a barrier of the
// block come before others use it.
__device__ __forceinline__ void begin_barrier(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// The same by those threads whose `arrives` is true, without a branch.
__device__ __forceinline__ void arrive_if(bool arrives, unsigned barrier) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}\n" ::"r"(barrier),
      "r"(static_cast<int>(arrives))
      : "memory");
}
// Who arrives for a warp whose lanes have all come here (__syncwarp): one of them. racecheck takes for
// ordered only what the arriving thread itself has done before, so that in builds for it (KRAIT_RACECHECK)
// all of them arrive.
#ifdef KRAIT_RACECHECK
inline constexpr unsigned kArrivalsOfWarp = 32;
#else
inline constexpr unsigned kArrivalsOfWarp = 1;
#endif
constexpr unsigned arrivals_of(int warps) { return static_cast<unsigned>(warps) * kArrivalsOfWarp; }
__device__ __forceinline__ bool arrives_for_warp(int lane) {
  return static_cast<unsigned>(lane) < kArrivalsOfWarp;
}
// The lanes come here, and the warp arrives.
__device__ __forceinline__ void arrive_of_warp(unsigned barrier, int lane) {
  __syncwarp();
  arrive_if(arrives_for_warp(lane), barrier);
}
// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void arrive_expecting(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Arrives when all cp.async that the thread has begun are there; one of the barrier's arrivals.
__device__ __forceinline__ void arrive_after_copies(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_for_phase(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

#endif

}  // namespace krait::cuda
