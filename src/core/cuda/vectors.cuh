// Vectors of 8 elements in kernels: 16 bytes of bf16 and f16, twice that of f32. Addresses are multiples
// of 16.
#pragma once

#include <type_traits>

#include "core/cuda/elements.cuh"
#include "core/cuda/exponentials.cuh"

namespace krait::cuda {

inline constexpr int kPack = 8;

template <typename T>
struct alignas(16) Pack {
  T v[kPack];
};

// Element i, known at compile time. A bf16 is a half of a word, made a float by a shift or a mask; to extract
// it first would take another instruction.
template <typename T>
__device__ __forceinline__ float float_of(const Pack<T>& pack, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(&pack)[i / 2];
    return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000U);
  } else {
    return to_float(pack.v[i]);
  }
}

// Data that no one reads again soon: it leaves the caches first.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  Pack<T> pack;
  const auto* source = reinterpret_cast<const uint4*>(from);
  auto* to = reinterpret_cast<uint4*>(&pack);
#pragma unroll
  for (unsigned i = 0; i < sizeof(Pack<T>) / sizeof(uint4); ++i) to[i] = __ldcs(source + i);
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* to, const float (&values)[kPack]) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPack; ++i) pack.v[i] = from_float<T>(values[i]);
  *reinterpret_cast<Pack<T>*>(to) = pack;
}

// 8 elements of a dtype known at run time, such as a weight that every row reads: they stay in the caches.
__device__ __forceinline__ void load_floats(const void* from, DType dtype, std::int64_t at,
                                            float (&to)[kPack]) {
  if (dtype == DType::f32) {
    const auto pack = *reinterpret_cast<const Pack<float>*>(static_cast<const float*>(from) + at);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] = pack.v[i];
  } else if (dtype == DType::bf16) {
    const auto pack =
        *reinterpret_cast<const Pack<__nv_bfloat16>*>(static_cast<const __nv_bfloat16*>(from) + at);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] = float_of(pack, i);
  } else {
    const auto pack = *reinterpret_cast<const Pack<__half>*>(static_cast<const __half*>(from) + at);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] = float_of(pack, i);
  }
}

}  // namespace krait::cuda
