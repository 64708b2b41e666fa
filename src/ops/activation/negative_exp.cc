#include <cmath>

#include "core/build.h"
#include "krait/core/error.h"
#include "krait/ops/activation.h"
#include "ops/activation/kernels.h"

namespace krait {

Tensor negative_exp(Context& ctx, const Tensor& A_log) {
  require_on_device(ctx, "negative_exp", {{"A_log", A_log}});
  require(A_log.dtype() != DType::f64 && is_float(A_log.dtype()), "[negative_exp] A_log has dtype ",
          A_log.dtype(), ", expected f32, bf16 or f16");
  const Tensor A = ctx.empty(A_log.shape());
  ctx.copy(A_log, A);
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      activation::cuda_negative_exp(ctx, A);
      return A;
    }
  }
  for (float& value : A.span<float>()) value = -std::exp(value);
  return A;
}

void negative_exp_backward(Context& ctx, const Tensor& A, const Tensor& dA, const Tensor& dA_log) {
  require_on_device(ctx, "negative_exp_backward", {{"A", A}, {"dA", dA}, {"dA_log", dA_log}});
  for (const Tensor* t : {&A, &dA, &dA_log})
    require(t->dtype() == DType::f32 && t->is_contiguous() && t->shape() == A.shape(),
            "[negative_exp_backward] a tensor is ", t->dtype(), ' ', t->shape(), ", expected contiguous f32 ",
            A.shape());
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) return activation::cuda_negative_exp_backward(ctx, A, dA, dA_log);
  }
  const auto a = A.span<float>();
  const auto da = dA.span<float>();
  const auto sum = dA_log.span<float>();
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += da[i] * a[i];
}

}  // namespace krait
