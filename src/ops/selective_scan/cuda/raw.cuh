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
  alignas(16) std::uint32_t word[sizeof(T)];

  __device__ __forceinline__ void load(const char* from) {
    *reinterpret_cast<Words*>(word) = *reinterpret_cast<const Words*>(from);
  }
  // Past the first-level cache.
  __device__ __forceinline__ void load_past_cache(const char* from) {
    *reinterpret_cast<Words*>(word) = __ldcg(reinterpret_cast<const Words*>(from));
  }
  __device__ __forceinline__ void store(char* to) const {
    *reinterpret_cast<Words*>(to) = *reinterpret_cast<const Words*>(word);
  }
  __device__ __forceinline__ void to_floats(float (&to)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (std::is_same_v<T, float>)
        to[e] = __uint_as_float(word[e]);
      else if constexpr (std::is_same_v<T, __nv_bfloat16>)
        to[e] = __uint_as_float(e % 2 == 0 ? word[e / 2] << 16 : word[e / 2] & 0xffff0000U);
      else
        to[e] = cuda::float_of(word[e / 2] >> (e % 2 * 16) & 0xffffU, DType::f16);
    }
  }
  __device__ __forceinline__ void fill(std::uint32_t bits) {
#pragma unroll
    for (auto& w : word) w = bits;
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
