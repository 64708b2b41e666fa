#include "krait/ops/cross_entropy.h"

#include "core/build.h"
#include "krait/core/error.h"
#include "ops/cross_entropy/kernels.h"
#include "ops/gpu_dtypes.h"

namespace krait {
namespace cross_entropy_detail {

void fail_target(std::int64_t target, std::int64_t place, std::int64_t vocabulary, std::int64_t ignore_index,
                 const char* op) {
  fail(ErrorKind::invalid_argument, "[", op, "] target ", target, " at position ", place, " is outside [0, ",
       vocabulary, ") and not ignore_index (", ignore_index, ")");
}

Tensor checked_targets(Context& ctx, const Tensor& targets, std::int64_t count, std::int64_t vocabulary,
                       std::int64_t ignore_index, const char* op) {
  require(targets.defined(), "[", op, "] targets is absent");
  require(targets.dtype() == DType::i64 || targets.dtype() == DType::i32, "[", op, "] targets has dtype ",
          targets.dtype(), ", expected i64 or i32");
  require(targets.shape() == Dims{count}, "[", op, "] targets has shape ", targets.shape(), ", expected ",
          Dims{count}, ": one for each token");
  require_on_device(ctx, op, {{"targets", targets}});
  if (ctx.on_gpu()) return targets;
  const Tensor wide = targets.to(DType::i64).contiguous();
  const auto values = wide.span<std::int64_t>();
  for (std::size_t i = 0; i < values.size(); ++i)
    if (values[i] != ignore_index && (values[i] < 0 || values[i] >= vocabulary))
      fail_target(values[i], static_cast<std::int64_t>(i), vocabulary, ignore_index, op);
  return wide;
}

void check_smoothing(double label_smoothing, const char* op) {
  require(label_smoothing >= 0.0 && label_smoothing < 1.0, "[", op, "] label_smoothing is ", label_smoothing,
          ", expected [0, 1)");
}

const char* run(Context& ctx, const Rows& rows) {
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      cuda(ctx, rows);
      return "cuda";
    }
  }
  if (ctx.reference() || rows.logits.dtype() == DType::f64) {
    reference(ctx, rows);
    return "reference";
  }
  simd(ctx, rows);
  return "simd";
}

void finish(Context& ctx, const Tensor& targets, std::int64_t vocabulary, std::int64_t ignore_index,
            const char* op, CrossEntropyResult& result, bool read_later) {
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      cuda_add_up(ctx, targets, vocabulary, ignore_index, result);
      if (!read_later) read_totals(ctx, result, op);
      return;
    }
  }
  const Tensor losses = result.losses.to(DType::f64);
  const auto values = targets.span<std::int64_t>();
  double sum = 0.0;
  result.count = 0;
  for (std::size_t t = 0; t < values.size(); ++t) {
    if (values[t] == ignore_index) continue;
    sum += losses.data<double>()[t];
    ++result.count;
  }
  result.mean = result.count == 0 ? 0.0 : sum / static_cast<double>(result.count);
}

}  // namespace cross_entropy_detail

void read_totals(Context& ctx, CrossEntropyResult& result, const char* op) {
  if (!result.totals) return;
  if constexpr (kWithCuda) cross_entropy_detail::cuda_read_totals(ctx, result, op);
}

CrossEntropyResult cross_entropy(Context& ctx, const CrossEntropyArgs& args) {
  namespace detail = cross_entropy_detail;
  require(args.logits.defined(), "[cross_entropy] logits is absent");
  require(is_float(args.logits.dtype()), "[cross_entropy] logits has dtype ", args.logits.dtype(),
          ", expected f32, f64, bf16 or f16");
  require(args.logits.ndim() == 2, "[cross_entropy] logits has shape ", args.logits.shape(),
          ", expected (T, V)");
  detail::check_smoothing(args.label_smoothing, "cross_entropy");
  const std::int64_t count = args.logits.size(0);
  require_on_device(ctx, "cross_entropy", {{"logits", args.logits}});
  if (ctx.on_gpu()) require_gpu_floats("cross_entropy", {{"logits", args.logits}});
  const std::int64_t vocabulary = args.logits.size(1);
  const Tensor targets =
      detail::checked_targets(ctx, args.targets, count, vocabulary, args.ignore_index, "cross_entropy");

  const DType dtype = args.logits.dtype() == DType::f64 ? DType::f64 : DType::f32;
  CrossEntropyResult result{.losses = ctx.empty({count}, dtype), .logsumexp = ctx.empty({count}, dtype)};
  const char* path = detail::run(ctx, {.logits = args.logits,
                                       .targets = targets,
                                       .ignore_index = args.ignore_index,
                                       .label_smoothing = args.label_smoothing,
                                       .losses = result.losses,
                                       .logsumexp = result.logsumexp});
  detail::finish(ctx, targets, vocabulary, args.ignore_index, "cross_entropy", result);
  ctx.set_backend("cross_entropy", path);
  return result;
}

}  // namespace krait
