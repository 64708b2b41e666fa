#include "ops/linear/cuda/few_rows.cuh"

#include "ops/linear/kernels.h"

namespace krait::linear_detail {

bool gpu::few_rows(Context& ctx, const Problem& problem) {
  const Tensor& weight = problem.weight;
  const Tensor& x = problem.x;
  const cuda::DeviceLimits& limits = cuda::limits_of(ctx);
  if (!few_rows_fit(ctx, weight) || x.dtype() != weight.dtype()) return false;
  if (x.stride(1) != 1 || (x.size(0) > 1 && x.stride(0) % 8 != 0) ||
      reinterpret_cast<std::uintptr_t>(x.raw()) % 16 != 0)
    return false;
  const FewRowsPlan plan = choose_few_rows_plan(x.size(0), weight.size(1), weight.size(0),
                                                limits.multiprocessors, limits.shared_memory_per_block);
  if (plan.tiles == 0) return false;
  const FewRowsWeights p{.data = weight.raw(),
                         .stride = weight.stride(0),
                         .in = static_cast<int>(weight.size(1)),
                         .out = static_cast<int>(weight.size(0)),
                         .rows = static_cast<int>(x.size(0))};
  const PlainOutput output{.bias = cuda::AnyView<1>(problem.bias),
                           .out = cuda::AnyView<2>(problem.out),
                           .accumulate = problem.accumulate};
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    const PlainInput<T> input{.data = static_cast<const T*>(x.raw()), .stride = x.stride(0)};
    launch_few_rows<T>(ctx, "linear few rows", plan, p, input, output);
  };
  weight.dtype() == DType::f16 ? run(__half{}) : run(__nv_bfloat16{});
  return true;
}

}  // namespace krait::linear_detail
