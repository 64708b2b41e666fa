// Exponentials, and what is made of them, by the special function unit.
#pragma once

#include "core/cuda/gpu.h"

namespace krait::cuda {

inline constexpr float kLog2E = 1.4426950408889634F;

// 2^x to two units in the last place; 0 where the result is below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x to a unit in the last place, for x that is no subnormal number.
__device__ __forceinline__ float reciprocal_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0F / x;
#endif
}

// The exponential is off by 2 + 1.2 |v| ULP at most, the result by no more, and by 1 ULP or so where v > 0.
// Zero where v < -88.
__device__ __forceinline__ float quick_sigmoid(float v) {
  return reciprocal_fast(1.0F + exp2_fast(v * -kLog2E));
}
__device__ __forceinline__ float quick_silu(float v) { return v * quick_sigmoid(v); }
// The derivative of silu at v, given sigmoid(v).
__device__ __forceinline__ float silu_slope(float v, float sigmoid_of_v) {
  return sigmoid_of_v * fmaf(v, 1.0F - sigmoid_of_v, 1.0F);
}

}  // namespace krait::cuda
