#include "core/cuda/elements.cuh"
#include "ops/activation/kernels.h"

namespace krait::activation {
namespace {

constexpr int kThreads = 256;

__global__ void negative_exp_kernel(std::int64_t count, float* a) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads)
    a[i] = -expf(a[i]);
}

__global__ void negative_exp_backward_kernel(std::int64_t count, const float* a, const float* da,
                                             float* sum) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads)
    sum[i] += da[i] * a[i];
}

}  // namespace

void cuda_negative_exp(Context& ctx, const Tensor& a) {
  if (a.numel() == 0) return;
  cuda::launch(ctx, "negative_exp", negative_exp_kernel, cuda::blocks_for(ctx, a.numel(), kThreads), kThreads,
               0, a.numel(), a.data<float>());
}

void cuda_negative_exp_backward(Context& ctx, const Tensor& a, const Tensor& da, const Tensor& sum) {
  if (a.numel() == 0) return;
  cuda::launch(ctx, "negative_exp_backward", negative_exp_backward_kernel,
               cuda::blocks_for(ctx, a.numel(), kThreads), kThreads, 0, a.numel(), a.data<float>(),
               da.data<float>(), sum.data<float>());
}

}  // namespace krait::activation
