// Copies of whole tiles by one thread (TMA), from compute capability 9.0 on: what describes a tensor to them,
// and the copy. Not for HIP.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <optional>

#include "core/cuda/gpu.h"
#include "krait/core/tensor.h"

namespace krait::cuda {

// Of a tensor (B, L, H, P) of bf16 or f16: tiles of `rows` steps along L and 64 elements of P, as PanelTile
// (wgmma.cuh) has a panel; what lies outside of the tensor is 0 in them. Nothing where its strides are none
// that the hardware takes, or the driver knows no such copies.
inline std::optional<CUtensorMap> describe_tiles(const Tensor& t, int rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    const bool there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
    return there ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
  }();
  if (encode == nullptr || t.ndim() != 4 || t.numel() == 0 || t.stride(3) != 1) return std::nullopt;
  cuuint64_t sizes[4];
  cuuint64_t strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<cuuint64_t>(t.size(3 - i));
  for (int i = 0; i < 3; ++i) {
    const std::int64_t stride =
        t.size(2 - i) == 1 ? 8 : t.stride(2 - i);  // of elements, any where there is one
    if (stride <= 0 || stride % 8 != 0) return std::nullopt;
    strides[i] = static_cast<cuuint64_t>(stride * 2);
  }
  const cuuint32_t box[4] = {64, 1, static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t each[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode(
      &map, t.dtype() == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      t.raw(), sizes, strides, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) return std::nullopt;
  return map;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Begins to bring the tile from element `p` of `h`, step `l` of row `b` on to `shared`, a multiple of 1024.
// Its bytes are announced to `barrier` (mbarrier.cuh) by whoever calls this.
__device__ __forceinline__ void copy_tile_async(unsigned shared, const CUtensorMap& map, int p, int h, int l,
                                                int b, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
      "%5}], [%6];\n" ::"r"(shared),
      "l"(&map), "r"(p), "r"(h), "r"(l), "r"(b), "r"(barrier)
      : "memory");
}
// The same with a policy of the second-level cache (async_copy.cuh).
__device__ __forceinline__ void copy_tile_async(unsigned shared, const CUtensorMap& map, int p, int h, int l,
                                                int b, unsigned barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%2, %3, %4, %5}], [%6], %7;\n" ::"r"(shared),
      "l"(&map), "r"(p), "r"(h), "r"(l), "r"(b), "r"(barrier), "l"(policy)
      : "memory");
}

// Begins to write the tile at `shared` there; what lies outside of the tensor is left out. What threads have
// written to it is fenced (fence_shared) and waited for by whoever calls this. Stores of a thread are closed
// into a group, and `wait_for_stored_tiles` waits until those of all its groups have read their tiles.
__device__ __forceinline__ void store_tile_async(const CUtensorMap& map, int p, int h, int l, int b,
                                                 unsigned shared) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n"
      "cp.async.bulk.commit_group;\n" ::"l"(&map),
      "r"(p), "r"(h), "r"(l), "r"(b), "r"(shared)
      : "memory");
}
__device__ __forceinline__ void store_tile_async(const CUtensorMap& map, int p, int h, int l, int b,
                                                 unsigned shared, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%1, %2, %3, %4}], [%5], "
      "%6;\n"
      "cp.async.bulk.commit_group;\n" ::"l"(&map),
      "r"(p), "r"(h), "r"(l), "r"(b), "r"(shared), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void wait_for_stored_tiles() {
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}

#endif

}  // namespace krait::cuda
