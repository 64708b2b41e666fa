// The names of the GPU's runtime, in one place. Sources are written in CUDA's; hipcc sees HIP's under the
// same names (gpu_hip.h).
#pragma once

#ifdef __HIP_PLATFORM_AMD__
#include "core/cuda/gpu_hip.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <string_view>
#include <utility>

#include "core/device_backend.h"
#include "krait/core/context.h"
#include "krait/core/error.h"

namespace krait::cuda {

// Throws an Error that says what failed, where `status` is not success.
void check(cudaError_t status, std::string_view what);

// The context's device is current in this scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

[[nodiscard]] inline cudaStream_t stream_of(const Context& ctx) {
  return static_cast<cudaStream_t>(ctx.stream());
}

// Properties that choices of kernels depend on.
struct DeviceLimits {
  int multiprocessors = 0;
  int shared_memory_per_block = 0;  // what a kernel may ask for, with the attribute raised
  int l2_bytes = 0;
  int compute_capability = 0;  // 90 for 9.0; 0 where the device has none of NVIDIA's instructions
};
const DeviceLimits& limits_of(const Context& ctx);

// What is queued in this scope counts as the kernel `name` where the context profiles.
class KernelScope {
 public:
  KernelScope(const Context& ctx, std::string_view name)
      : backend_(ctx.profiling() ? ctx.device_backend() : nullptr) {
    if (backend_ != nullptr) backend_->begin_kernel(name);
  }
  ~KernelScope() {
    if (backend_ != nullptr) backend_->end_kernel();
  }
  KernelScope(const KernelScope&) = delete;
  KernelScope& operator=(const KernelScope&) = delete;

 private:
  DeviceBackend* backend_;
};

#if defined(__CUDACC__) || defined(__HIPCC__)
// Launches `kernel` on the context's stream; `what` is named where the launch fails. Beyond 48 KB, what a
// kernel declares itself included, the runtime wants to be told how much a launch may ask for.
template <typename... Parameters, typename... Arguments>
void launch(const Context& ctx, std::string_view what, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::size_t shared, Arguments&&... arguments) {
  const DeviceGuard guard(ctx.device().index);
  if (shared > 32 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          what);
  const KernelScope scope(ctx, what);
  kernel<<<grid, block, shared, stream_of(ctx)>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), what);
  ctx.device_backend()->queued(/*kernel=*/true);
}

// The same for a kernel that calls wait_for_previous() (overlap.cuh): inside of OverlappingKernels its blocks
// may start while the kernel in front of it still runs.
template <typename... Parameters, typename... Arguments>
void launch_overlapping(const Context& ctx, std::string_view what, void (*kernel)(Parameters...), dim3 grid,
                        dim3 block, std::size_t shared, Arguments&&... arguments) {
#ifndef __HIP_PLATFORM_AMD__
  if (ctx.device_backend()->may_overlap() && !ctx.profiling() && limits_of(ctx).compute_capability >= 90) {
    const DeviceGuard guard(ctx.device().index);
    if (shared > 32 * 1024)
      check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
            what);
    // A multiprocessor whose split between L1 and shared memory is another runs empty before it changes it:
    // all overlapping kernels ask for the same.
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        what);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream_of(ctx);
    config.attrs = &early;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
    return;
  }
#endif
  launch(ctx, what, kernel, grid, block, shared, std::forward<Arguments>(arguments)...);
}

#ifndef __HIP_PLATFORM_AMD__
// The same for a kernel whose blocks wait for one another: all of them run at once, or none.
template <typename... Parameters, typename... Arguments>
void launch_together(const Context& ctx, std::string_view what, void (*kernel)(Parameters...), dim3 grid,
                     dim3 block, std::size_t shared, Arguments&&... arguments) {
  const DeviceGuard guard(ctx.device().index);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
        what);
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream_of(ctx);
  config.attrs = &together;
  config.numAttrs = 1;
  const KernelScope scope(ctx, what);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
  ctx.device_backend()->queued(/*kernel=*/true);
}
#endif
#endif

// Blocks of `threads` that cover `count` elements with a grid-stride loop, at most `waves` times what the
// device holds.
[[nodiscard]] inline unsigned blocks_for(const Context& ctx, std::int64_t count, int threads,
                                         int blocks_per_multiprocessor = 16) {
  const std::int64_t wanted = (count + threads - 1) / threads;
  const std::int64_t most = std::int64_t{limits_of(ctx).multiprocessors} * blocks_per_multiprocessor;
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace krait::cuda
