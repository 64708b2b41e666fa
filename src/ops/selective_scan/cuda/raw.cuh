// Elements on their way between memory and the kernels whose warps have roles (channel_last.cuh,
// unwind_roles_moves.cuh).
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cuda/bits.cuh"

namespace krait::scan {

// Four elements of T, as they lie in memory.
template <typename T>
struct Raw {
  using Words = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  alignas(16) std::conditional_t<sizeof(T) == 4, cuda::Bits<4>, cuda::NarrowBits<4>> bits;

  __device__ __forceinline__ void load(const char* from) {
    *reinterpret_cast<Words*>(bits.word) = *reinterpret_cast<const Words*>(from);
  }
  // Past the first-level cache.
  __device__ __forceinline__ void load_past_cache(const char* from) {
    *reinterpret_cast<Words*>(bits.word) = __ldcg(reinterpret_cast<const Words*>(from));
  }
  __device__ __forceinline__ void store(char* to) const {
    *reinterpret_cast<Words*>(to) = *reinterpret_cast<const Words*>(bits.word);
  }
  __device__ __forceinline__ void to_floats(float (&to)[4]) const {
    if constexpr (sizeof(T) == 4)
      bits.to_floats(DType::f32, to);
    else
      bits.template to_floats<T>(to);
  }
  __device__ __forceinline__ void fill(std::uint32_t value) {
#pragma unroll
    for (auto& w : bits.word) w = value;
  }
};

// Of two elements of 16 bits, or of one.
template <typename T>
inline constexpr std::uint32_t kMinusInfinity = 0xff800000U;
template <>
inline constexpr std::uint32_t kMinusInfinity<__nv_bfloat16> = 0xff80ff80U;
template <>
inline constexpr std::uint32_t kMinusInfinity<__half> = 0xfc00fc00U;

}  // namespace krait::scan
