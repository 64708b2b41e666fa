// Elements of tensors in kernels: typed loads and stores that compute in f32, and views whose element type is
// known at run time alone, for kernels whose speed does not depend on it.
#pragma once

#include <cstdint>

#include "core/cuda/gpu.h"
#include "krait/core/dtype.h"
#include "krait/core/tensor.h"

namespace krait::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// Element `i` of memory whose floats are of `dtype` (f32, bf16 or f16).
__device__ __forceinline__ float load_float(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::f16: return to_float(static_cast<const __half*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

__device__ __forceinline__ void store_float(void* data, DType dtype, std::int64_t i, float value) {
  switch (dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(value); break;
    case DType::f16: static_cast<__half*>(data)[i] = from_float<__half>(value); break;
    default: static_cast<float*>(data)[i] = value;
  }
}

// A tensor of kRank dimensions in a kernel, any strides, f32, bf16 or f16. False where the tensor is absent.
template <int kRank>
struct AnyView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t stride[kRank] = {};

  AnyView() = default;
  explicit AnyView(const Tensor& t) {
    if (!t) return;
    require(t.ndim() == kRank, "a view of ", kRank, " dimensions of a tensor of shape ", t.shape());
    data = t.raw();
    dtype = t.dtype();
    for (int i = 0; i < kRank; ++i) stride[i] = t.stride(i);
  }

  __device__ explicit operator bool() const { return data != nullptr; }
  template <typename... Index>
  __device__ __forceinline__ std::int64_t offset(Index... index) const {
    static_assert(sizeof...(Index) == kRank);
    std::int64_t at = 0;
    int dim = 0;
    ((at += static_cast<std::int64_t>(index) * stride[dim++]), ...);
    return at;
  }
  template <typename... Index>
  __device__ __forceinline__ float load(Index... index) const {
    return load_float(data, dtype, offset(index...));
  }
  template <typename... Index>
  __device__ __forceinline__ void store(float value, Index... index) const {
    store_float(data, dtype, offset(index...), value);
  }
};

// Element i of a tensor of i32 or i64 with one dimension.
struct IndexView {
  const void* data = nullptr;
  bool wide = false;
  std::int64_t stride = 1;

  IndexView() = default;
  explicit IndexView(const Tensor& t) {
    if (!t) return;
    data = t.raw();
    wide = t.dtype() == DType::i64;
    stride = t.ndim() == 0 ? 1 : t.stride(0);
  }
  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ std::int64_t operator()(std::int64_t i) const {
    return wide ? static_cast<const std::int64_t*>(data)[i * stride]
                : std::int64_t{static_cast<const std::int32_t*>(data)[i * stride]};
  }
};

// From the dtype of a tensor to a type of the kernel: calls f(T{}) for float, __nv_bfloat16 or __half.
template <typename F>
void dispatch_element(DType dtype, std::string_view what, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(__nv_bfloat16{});
    case DType::f16: return f(__half{});
    default: break;
  }
  fail(ErrorKind::invalid_argument, what, " has dtype ", name_of(dtype),
       ", expected f32, bf16 or f16 on a GPU");
}

__device__ __forceinline__ float sigmoid(float v) { return 1.0F / (1.0F + expf(-v)); }
__device__ __forceinline__ float silu(float v) { return v / (1.0F + expf(-v)); }
// log(1 + exp(v)), v itself where exp would overflow.
__device__ __forceinline__ float softplus(float v) { return v > 20.0F ? v : log1pf(expf(v)); }

// Sums over the 32 lanes of a warp, in every lane; the order of the additions is fixed.
__device__ __forceinline__ float warp_sum(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffU, v, step);
  return v;
}

// Sum over a block of whole warps, in every thread; `scratch` has 33 floats of shared memory.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  v = warp_sum(v);
  __syncthreads();  // the caller may call twice with one scratch
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  if (warp == 0) {
    v = warp_sum(lane < warps ? scratch[lane] : 0.0F);
    if (lane == 0) scratch[32] = v;
  }
  __syncthreads();
  return scratch[32];
}

}  // namespace krait::cuda
