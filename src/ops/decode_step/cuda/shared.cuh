// Shared memory by its addresses of 32 bits, which take fewer registers and instructions than pointers.
#pragma once

#include <cstdint>

#include "core/cuda/gpu.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace krait::decode_detail {

__device__ __forceinline__ uint4 read_16(unsigned at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at));
  return v;
}
__device__ __forceinline__ uint2 read_8(unsigned at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}
__device__ __forceinline__ float read_float(unsigned at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(v) : "r"(at));
  return v;
}
__device__ __forceinline__ void write(unsigned at, unsigned v) {
  asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(at), "r"(v) : "memory");
}
__device__ __forceinline__ void write(unsigned at, float v) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(at), "f"(v) : "memory");
}

__device__ __forceinline__ void write(unsigned at, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};\n" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}

// v, by way of 4 bytes at `at` that belong to the thread: the compiler, which does not see where it comes
// from, keeps it in a register and does not compute it anew at each use.
__device__ __forceinline__ unsigned held(unsigned v, unsigned at) {
  unsigned same;
  asm volatile(
      "st.volatile.shared.u32 [%1], %2;\n"
      "ld.volatile.shared.u32 %0, [%1];\n"
      : "=r"(same)
      : "r"(at), "r"(v)
      : "memory");
  return same;
}

__device__ __forceinline__ std::int64_t held(std::int64_t v, unsigned at) {
  const auto bits = static_cast<std::uint64_t>(v);
  const std::uint64_t high = held(static_cast<unsigned>(bits >> 32), at);
  return static_cast<std::int64_t>(high << 32 | held(static_cast<unsigned>(bits), at));
}

}  // namespace krait::decode_detail

#endif
