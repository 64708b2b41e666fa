#include "core/build.h"
#include "krait/core/error.h"
#include "krait/ops/cross_entropy.h"
#include "ops/cross_entropy/kernels.h"
#include "ops/gpu_dtypes.h"
#include "ops/token_runs.h"

namespace krait {

namespace detail = cross_entropy_detail;

const char* detail::run_backward(Context& ctx, const GradientRows& rows) {
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      cuda_backward(ctx, rows);
      return "cuda";
    }
  }
  const bool f64 = rows.logits.dtype() == DType::f64 || rows.dlogits.dtype() == DType::f64 ||
                   rows.logsumexp.dtype() == DType::f64;
  if (ctx.reference() || f64) {
    reference_backward(ctx, rows);
    return "reference";
  }
  simd_backward(ctx, rows);
  return "simd";
}

void cross_entropy_backward(Context& ctx, const CrossEntropyBackwardArgs& args) {
  constexpr const char* kOp = "cross_entropy_backward";
  require(args.logits.defined() && args.logits.ndim() == 2, "[", kOp, "] logits has shape ",
          args.logits.shape(), ", expected (T, V)");
  require(args.dlogits.defined(), "[", kOp, "] dlogits is absent");
  require(args.dlogits.shape() == args.logits.shape(), "[", kOp, "] dlogits has shape ", args.dlogits.shape(),
          ", expected ", args.logits.shape());
  for (const Tensor* t : {&args.logits, &args.dlogits})
    require(is_float(t->dtype()), "[", kOp, "] ", t == &args.logits ? "logits" : "dlogits", " has dtype ",
            t->dtype(), ", expected f32, f64, bf16 or f16");
  require(!may_overlap(args.logits, args.dlogits) || same_view(args.logits, args.dlogits), "[", kOp,
          "] dlogits overlaps logits, expected the same view or another memory");
  detail::check_smoothing(args.label_smoothing, kOp);
  const std::int64_t count = args.logits.size(0);
  require_on_device(ctx, kOp,
                    {{"logits", args.logits}, {"logsumexp", args.logsumexp}, {"dlogits", args.dlogits}});
  if (ctx.on_gpu())
    require_gpu_floats(kOp,
                       {{"logits", args.logits}, {"logsumexp", args.logsumexp}, {"dlogits", args.dlogits}});
  const Tensor targets =
      detail::checked_targets(ctx, args.targets, count, args.logits.size(1), args.ignore_index, kOp);

  const DType dtype = args.logits.dtype() == DType::f64 ? DType::f64 : DType::f32;
  Tensor logsumexp = args.logsumexp;
  if (logsumexp) {
    require(logsumexp.shape() == Dims{count} && is_float(logsumexp.dtype()), "[", kOp, "] logsumexp is ",
            logsumexp.dtype(), " ", logsumexp.shape(), ", expected floats of shape ", Dims{count});
    logsumexp = ctx.contiguous(ctx.to(logsumexp, dtype));
  } else {
    logsumexp = ctx.empty({count}, dtype);
    detail::run(ctx, {.logits = args.logits,
                      .targets = targets,
                      .ignore_index = args.ignore_index,
                      .losses = ctx.empty({count}, dtype),
                      .logsumexp = logsumexp});
  }
  const char* path = detail::run_backward(ctx, {.logits = args.logits,
                                                .targets = targets,
                                                .ignore_index = args.ignore_index,
                                                .label_smoothing = args.label_smoothing,
                                                .scale = args.scale,
                                                .logsumexp = logsumexp,
                                                .dlogits = args.dlogits});
  ctx.set_backend(kOp, path);
}

}  // namespace krait
