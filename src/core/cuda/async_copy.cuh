// Copies from global to shared memory that run while the thread goes on: 16 bytes each, or 8, which also stay
// in the first-level cache; both addresses are multiples of that. A thread that reads only what it copied
// itself needs no barrier.
#pragma once

#include <cstdint>

#include "core/cuda/gpu.h"

namespace krait::cuda {

template <int kBytes = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 8 || kBytes == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(to), "l"(global) : "memory");
#else
  if constexpr (kBytes == 16)
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
  else
    *static_cast<uint2*>(shared) = *static_cast<const uint2*>(global);
#endif
}

// A policy of the second-level cache, for what nobody will ask for again: it goes first.
__device__ __forceinline__ std::uint64_t evict_first() {
  std::uint64_t policy = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
#endif
  return policy;
}

// Closes a group of copies, which may be empty.
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until no more than `kRunning` of the thread's latest groups are still under way.
template <int kRunning>
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kRunning) : "memory");
#endif
}

}  // namespace krait::cuda
