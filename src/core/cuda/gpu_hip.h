// CUDA's names on HIP, as far as the sources use them: compiled by hipcc for AMD GPUs whose wavefronts have
// 64 lanes, such as gfx90a.
//
// Kernels are written for warps of 32 threads that follow one another in a block. A wavefront holds two of
// them, its lower and its upper half, which run in step; where they take different ways, one waits for the
// other. So
//  - a shuffle of width 32 stays within the half, that is, within the warp: it reads lanes that run the same
//    instruction, for kernels call it with all 32 lanes of a warp, as the full mask says;
//  - a vote takes its half of the wavefront's 64 bits; lanes of the other half that do not take part are 0;
//  - a barrier of a warp costs nothing in the machine, since lanes of a wavefront are never apart and its
//    accesses to memory stay in order; it keeps the compiler from moving accesses across;
//  - a barrier of the block counts wavefronts: kernels call it with all threads of the block, and where
//  threads
//    with different tasks meet at barriers of their own code, tasks change at multiples of 64 threads;
//  - no warp may wait in a loop for the other warp of its wavefront; kernels wait at barriers alone.
// Instructions of NVIDIA's alone (tensor cores, bulk copies) have their paths in kernels compiled for
// __CUDA_ARCH__, and are chosen by DeviceLimits::compute_capability, which is 0 here.
#pragma once

#ifdef __HIPCC__
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#else
#include <hip/hip_runtime_api.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>

#define cudaError_t hipError_t
#define cudaSuccess hipSuccess
#define cudaErrorInsufficientDriver hipErrorInsufficientDriver
#define cudaErrorInvalidDeviceFunction hipErrorInvalidDeviceFunction
#define cudaErrorMemoryAllocation hipErrorOutOfMemory
#define cudaErrorNoDevice hipErrorNoDevice
#define cudaErrorNoKernelImageForDevice hipErrorNoBinaryForGpu
#define cudaGetErrorName hipGetErrorName
#define cudaGetErrorString hipGetErrorString
#define cudaGetLastError hipGetLastError

#define cudaDeviceAttr hipDeviceAttribute_t
#define cudaDevAttrL2CacheSize hipDeviceAttributeL2CacheSize
#define cudaDevAttrMaxSharedMemoryPerBlockOptin hipDeviceAttributeMaxSharedMemoryPerBlock  // all at once
#define cudaDevAttrMultiProcessorCount hipDeviceAttributeMultiprocessorCount
#define cudaDeviceGetAttribute hipDeviceGetAttribute
#define cudaDeviceProp hipDeviceProp_t
#define cudaDriverGetVersion hipDriverGetVersion
#define cudaGetDevice hipGetDevice
#define cudaGetDeviceCount hipGetDeviceCount
#define cudaGetDeviceProperties hipGetDeviceProperties
#define cudaRuntimeGetVersion hipRuntimeGetVersion
#define cudaSetDevice hipSetDevice

#define cudaFree hipFree
#define cudaFreeAsync hipFreeAsync
#define cudaFreeHost hipHostFree
#define cudaMalloc hipMalloc
#define cudaMallocAsync hipMallocAsync
#define cudaMemGetInfo hipMemGetInfo
#define cudaMemcpyAsync hipMemcpyAsync
#define cudaMemcpyDefault hipMemcpyDefault
#define cudaMemcpyDeviceToHost hipMemcpyDeviceToHost
#define cudaMemcpyHostToDevice hipMemcpyHostToDevice
#define cudaMemsetAsync hipMemsetAsync

#define cudaEventCreate hipEventCreate
#define cudaEventCreateWithFlags hipEventCreateWithFlags
#define cudaEventDestroy hipEventDestroy
#define cudaEventDisableTiming hipEventDisableTiming
#define cudaEventElapsedTime hipEventElapsedTime
#define cudaEventRecord hipEventRecord
#define cudaEventSynchronize hipEventSynchronize
#define cudaEvent_t hipEvent_t
#define cudaStreamCreateWithFlags hipStreamCreateWithFlags
#define cudaStreamDestroy hipStreamDestroy
#define cudaStreamNonBlocking hipStreamNonBlocking
#define cudaStreamSynchronize hipStreamSynchronize
#define cudaStream_t hipStream_t

#define cudaGraphDestroy hipGraphDestroy
#define cudaGraphExecDestroy hipGraphExecDestroy
#define cudaGraphExec_t hipGraphExec_t
#define cudaGraphLaunch hipGraphLaunch
#define cudaGraph_t hipGraph_t
#define cudaStreamBeginCapture hipStreamBeginCapture
#define cudaStreamCaptureMode hipStreamCaptureMode
#define cudaStreamCaptureModeRelaxed hipStreamCaptureModeRelaxed
#define cudaStreamCaptureStatus hipStreamCaptureStatus
#define cudaStreamCaptureStatusActive hipStreamCaptureStatusActive
#define cudaStreamCaptureStatusNone hipStreamCaptureStatusNone
#define cudaStreamGetCaptureInfo hipStreamGetCaptureInfo
#define cudaThreadExchangeStreamCaptureMode hipThreadExchangeStreamCaptureMode
#define cudaStreamEndCapture hipStreamEndCapture
inline hipError_t cudaGraphInstantiate(hipGraphExec_t* executable, hipGraph_t graph,
                                       unsigned long long /*flags*/) {
  return hipGraphInstantiate(executable, graph, nullptr, nullptr, 0);
}

inline hipError_t cudaMallocHost(void** memory, std::size_t bytes) {
  return hipHostMalloc(memory, bytes, hipHostMallocDefault);
}

#define cudaFuncAttributeMaxDynamicSharedMemorySize hipFuncAttributeMaxDynamicSharedMemorySize
#define cudaFuncSetAttribute hipFuncSetAttribute

#ifdef __HIPCC__

// The blocks that a multiprocessor should hold count NVIDIA's registers; HIP would read them as wavefronts.
#undef __launch_bounds__
#define __launch_bounds__(threads, ...) __attribute__((amdgpu_flat_work_group_size(1, threads)))
#define __grid_constant__  // parameters are read where they lie

#define __popc(v) static_cast<int>(__popc(v))  // unsigned in HIP
#define __ffs(v) static_cast<int>(__ffs(v))

// The round of HIP 5's own is to nearest.
#define __double2float_ru krait_double2float_ru
__device__ __forceinline__ float krait_double2float_ru(double v) {
  const auto nearest = static_cast<float>(v);
  return static_cast<double>(nearest) < v ? nextafterf(nearest, INFINITY) : nearest;
}

// bf16 as bits: there is no arithmetic in it.
struct __nv_bfloat16 {
  unsigned short bits;

  __nv_bfloat16() = default;
  __host__ __device__ explicit __nv_bfloat16(float v) {
    const auto wide = __builtin_bit_cast(unsigned, v);
    const bool nan = (wide & 0x7fffffffU) > 0x7f800000U;
    bits = nan ? 0x7fff : static_cast<unsigned short>((wide + 0x7fffU + (wide >> 16 & 1U)) >> 16);
  }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x;
  __nv_bfloat16 y;
};
__device__ __forceinline__ unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
__device__ __forceinline__ __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return __builtin_bit_cast(__nv_bfloat16, bits);
}
__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}
__device__ __forceinline__ __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
__device__ __forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
__device__ __forceinline__ float2 __bfloat1622float2(__nv_bfloat162 v) {
  return make_float2(__bfloat162float(v.x), __bfloat162float(v.y));
}

// Warps: see the top. `mask` is that of all 32 lanes.
template <typename T>
__device__ __forceinline__ T __shfl_sync(unsigned /*mask*/, T v, int lane, int width = 32) {
  return __shfl(v, lane & (width - 1), width);
}
template <typename T>
__device__ __forceinline__ T __shfl_xor_sync(unsigned /*mask*/, T v, int lanes, int width = 32) {
  return __shfl_xor(v, lanes, width);
}
template <typename T>
__device__ __forceinline__ T __shfl_up_sync(unsigned /*mask*/, T v, unsigned distance, int width = 32) {
  return __shfl_up(v, distance, width);
}
template <typename T>
__device__ __forceinline__ T __shfl_down_sync(unsigned /*mask*/, T v, unsigned distance, int width = 32) {
  return __shfl_down(v, distance, width);
}
__device__ __forceinline__ unsigned __ballot_sync(unsigned /*mask*/, int predicate) {
  return static_cast<unsigned>(__ballot(predicate) >> (__lane_id() & 32U));
}
template <typename T>
__device__ __forceinline__ unsigned __match_any_sync(unsigned mask, T v) {
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane)
    same |= static_cast<unsigned>(__shfl_sync(mask, v, lane) == v) << lane;
  return same;
}
template <typename T>
__device__ __forceinline__ T __reduce_add_sync(unsigned mask, T v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(mask, v, step);
  return v;
}
__device__ __forceinline__ void __syncwarp() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

// Where an address in shared memory lies there, as PTX wants it.
__device__ __forceinline__ unsigned __cvta_generic_to_shared(const void* p) {
  return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(p));
}

// Loads and stores that say how long their lines should stay in the caches.
template <typename T>
__device__ __forceinline__ T __ldcs(const T* from) {
  return *from;
}
template <typename T>
__device__ __forceinline__ T __ldcg(const T* from) {
  return *from;
}
template <typename T>
__device__ __forceinline__ void __stcs(T* to, T v) {
  *to = v;
}
template <typename T>
__device__ __forceinline__ void __stcg(T* to, T v) {
  *to = v;
}

#endif  // __HIPCC__
