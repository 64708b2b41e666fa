// Factors of operands that are rounded to 16 bits, two of which are multiplied at once.
#pragma once

#include "core/cuda/wgmma.cuh"
#include "ops/ssd/cuda/mma.cuh"

#ifdef KRAIT_WGMMA

namespace krait::ssd_detail {

// Of two elements in a register.
template <typename T>
struct alignas(8) PairFactor {
  float first, second;
  __device__ __forceinline__ PairFactor(float a, float b) : first(a), second(b) {}
  [[nodiscard]] __device__ __forceinline__ unsigned times(unsigned v) const {
    const float2 elements = unpack<T>(v);
    return pack<T>(elements.x * first, elements.y * second);
  }
};

// Of bf16 in two parts each, which make the factor to 2^-17: products are rounded as if they had been formed
// in f32, by two instructions in place of five.
template <>
struct alignas(8) PairFactor<__nv_bfloat16> {
  unsigned high, low;
  __device__ __forceinline__ PairFactor(float a, float b) : high(pack<__nv_bfloat16>(a, b)) {
    const float2 known = unpack<__nv_bfloat16>(high);
    low = pack<__nv_bfloat16>(a - known.x, b - known.y);
  }
  [[nodiscard]] __device__ __forceinline__ unsigned times(unsigned v) const {
    const auto of = [](const unsigned& bits) { return *reinterpret_cast<const __nv_bfloat162*>(&bits); };
    const __nv_bfloat162 product = __hfma2(of(v), of(high), __hmul2(of(v), of(low)));
    return *reinterpret_cast<const unsigned*>(&product);
  }
};

}  // namespace krait::ssd_detail

#endif
