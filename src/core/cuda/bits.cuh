// Loads of elements whose type is known at run time, apart from their conversion: a conversion waits for its
// load, so that loads which convert inside of a branch on the type wait for one another. Here the branch only
// picks the width, and what comes is kept as it is until it is used.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cuda/elements.cuh"

namespace krait::cuda {

__device__ __forceinline__ bool is_narrow(DType dtype) { return dtype != DType::f32; }  // of the floats here

// Element i as its bits; a narrow one in the low half.
__device__ __forceinline__ std::uint32_t load_bits(const void* data, DType dtype, std::int64_t i) {
  return is_narrow(dtype) ? static_cast<const std::uint16_t*>(data)[i]
                          : static_cast<const std::uint32_t*>(data)[i];
}

__device__ __forceinline__ float float_of(std::uint32_t bits, DType dtype) {
  switch (dtype) {
    case DType::bf16: return __uint_as_float(bits << 16);
    case DType::f16: return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    default: return __uint_as_float(bits);
  }
}

// kCount elements: narrow ones two to a word, the first in the low half.
template <int kCount>
struct Bits {
  std::uint32_t word[kCount];

  // Of elements side by side, aligned to the smaller of their size and 16 bytes.
  __device__ __forceinline__ void load_packed(const void* data, DType dtype, std::int64_t i) {
    if (is_narrow(dtype)) {
      if constexpr (kCount == 1)
        word[0] = static_cast<const std::uint16_t*>(data)[i];
      else
        load_words<(kCount + 1) / 2>(static_cast<const std::uint16_t*>(data) + i);
    } else {
      load_words<kCount>(static_cast<const std::uint32_t*>(data) + i);
    }
  }
  __device__ __forceinline__ void set(int e, std::uint32_t bits, bool narrow) {
    if (!narrow)
      word[e] = bits;
    else if (e % 2 == 0)
      word[e / 2] = bits;
    else
      word[e / 2] |= bits << 16;
  }
  __device__ __forceinline__ void to_floats(DType dtype, float (&to)[kCount]) const {
    // The branch on the type is taken once, not for each element.
    switch (dtype) {
      case DType::bf16:
#pragma unroll
        for (int e = 0; e < kCount; ++e)
          to[e] = __uint_as_float(e % 2 == 0 ? word[e / 2] << 16 : word[e / 2] & 0xffff0000U);
        break;
      case DType::f16:
#pragma unroll
        for (int e = 0; e < kCount; ++e) to[e] = float_of(word[e / 2] >> (e % 2 * 16) & 0xffffU, DType::f16);
        break;
      default:
#pragma unroll
        for (int e = 0; e < kCount; ++e) to[e] = __uint_as_float(word[e]);
    }
  }

 private:
  template <int kWords>
  __device__ __forceinline__ void load_words(const void* from) {
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = static_cast<const uint4*>(from)[i / 4];
        word[i] = v.x;
        word[i + 1] = v.y;
        word[i + 2] = v.z;
        word[i + 3] = v.w;
      }
    } else if constexpr (kWords == 2) {
      const uint2 v = *static_cast<const uint2*>(from);
      word[0] = v.x;
      word[1] = v.y;
    } else {
      static_assert(kWords == 1);
      word[0] = *static_cast<const std::uint32_t*>(from);
    }
  }
};

// As Bits, of 16-bit elements alone: half the registers.
template <int kCount>
struct NarrowBits {
  std::uint32_t word[(kCount + 1) / 2];

  // Of elements side by side, aligned to the smaller of their size and 16 bytes.
  __device__ __forceinline__ void load_packed(const void* data, std::int64_t i) {
    const auto* const from = static_cast<const std::uint16_t*>(data) + i;
    if constexpr (kCount == 1) {
      word[0] = *from;
    } else if constexpr (kCount == 2) {
      word[0] = *reinterpret_cast<const std::uint32_t*>(from);
    } else if constexpr (kCount == 4) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      word[0] = v.x;
      word[1] = v.y;
    } else {
      static_assert(kCount == 8);
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      word[0] = v.x;
      word[1] = v.y;
      word[2] = v.z;
      word[3] = v.w;
    }
  }
  template <typename T>
  __device__ __forceinline__ void to_floats(float (&to)[kCount]) const {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>)
        to[e] = __uint_as_float(e % 2 == 0 ? word[e / 2] << 16 : word[e / 2] & 0xffff0000U);
      else
        to[e] = float_of(word[e / 2] >> (e % 2 * 16) & 0xffffU, DType::f16);
    }
  }
};

}  // namespace krait::cuda
