// A barrier of a block whose warps come to it from different places of the code, as halves with roles of
// their own do: __syncthreads is defined for one place alone.
#pragma once

#include "core/cuda/gpu.h"

namespace krait::cuda {

// All kThreads threads of the block, or of a part of it that has a barrier of its own (1 is the block's);
// what they wrote to memory before is seen behind it.
template <int kThreads>
__device__ __forceinline__ void meet([[maybe_unused]] int barrier = 1) {
  static_assert(kThreads % 32 == 0);
#ifdef __HIP_PLATFORM_AMD__
  __syncthreads();
#elif defined(__CUDA_ARCH__)
  asm volatile("barrier.sync %0, %1;\n" ::"r"(barrier), "n"(kThreads) : "memory");
#endif
}

}  // namespace krait::cuda
