// A barrier of a block whose warps come to it from different places of the code, as halves with roles of
// their own do: __syncthreads is defined for one place alone.
#pragma once

#include "core/cuda/gpu.h"

namespace krait::cuda {

// All kThreads threads of the block; what they wrote to memory before is seen behind it.
template <int kThreads>
__device__ __forceinline__ void meet() {
  static_assert(kThreads % 32 == 0);
#ifdef __HIP_PLATFORM_AMD__
  __syncthreads();
#elif defined(__CUDA_ARCH__)
  asm volatile("barrier.sync 1, %0;\n" ::"n"(kThreads) : "memory");
#endif
}

}  // namespace krait::cuda
