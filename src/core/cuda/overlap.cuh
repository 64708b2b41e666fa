// For kernels that are launched by launch_overlapping(). In front of wait_for_previous() a kernel reads only
// what OverlappingKernels says does not change, and writes nothing; every thread that reads anything else, or
// writes, calls it first. As a kernel cannot end before it has waited for the one in front of it, whoever has
// waited for one has waited for all.
#pragma once

#include "core/cuda/gpu.h"

namespace krait::cuda {

// The next kernel's blocks may take what room the multiprocessors have left.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until all that was queued in front has ended and its writes are seen.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The 128 bytes at an address come closer, whoever writes them meanwhile.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address));
#endif
}

}  // namespace krait::cuda
