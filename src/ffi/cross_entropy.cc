#include "krait/ops/cross_entropy.h"

#include <tvm/ffi/container/tuple.h>

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

// The mean over targets that are not ignored, and their number.
using Totals = tvm::ffi::Tuple<double, std::int64_t>;

Totals hand_over(Context& ctx, const CrossEntropyResult& result, const Tensor& losses,
                 const Tensor& logsumexp) {
  if (losses) ctx.copy(result.losses, losses);
  if (logsumexp) ctx.copy(result.logsumexp, logsumexp);
  return Totals(result.mean, result.count);
}

Totals cross_entropy(Given logits, Given targets, std::int64_t ignore_index, double label_smoothing,
                     Given losses, Given logsumexp) {
  Operands of("cross_entropy");
  const CrossEntropyArgs args{.logits = of("logits", logits),
                              .targets = of("targets", targets),
                              .ignore_index = ignore_index,
                              .label_smoothing = label_smoothing};
  const Tensor to_losses = of("losses", losses);
  const Tensor to_logsumexp = of("logsumexp", logsumexp);
  const Lease ctx(of.device());
  return hand_over(*ctx, krait::cross_entropy(*ctx, args), to_losses, to_logsumexp);
}

void cross_entropy_backward(Given logits, Given targets, std::int64_t ignore_index, double label_smoothing,
                            Given logsumexp, double scale, Given dlogits) {
  Operands of("cross_entropy_backward");
  const CrossEntropyBackwardArgs args{.logits = of("logits", logits),
                                      .targets = of("targets", targets),
                                      .ignore_index = ignore_index,
                                      .label_smoothing = label_smoothing,
                                      .logsumexp = of("logsumexp", logsumexp),
                                      .scale = scale,
                                      .dlogits = of("dlogits", dlogits)};
  const Lease ctx(of.device());
  krait::cross_entropy_backward(*ctx, args);
}

LinearCrossEntropyArgs head_and_loss(Operands& of, const Given& x, const Given& weight, const Given& bias,
                                     const Given& targets, std::int64_t ignore_index, double label_smoothing,
                                     std::int64_t block) {
  return {.x = of("x", x),
          .weight = of("weight", weight),
          .bias = of("bias", bias),
          .targets = of("targets", targets),
          .ignore_index = ignore_index,
          .label_smoothing = label_smoothing,
          .block = block};
}

Totals linear_cross_entropy(Given x, Given weight, Given bias, Given targets, std::int64_t ignore_index,
                            double label_smoothing, std::int64_t block, Given losses, Given logsumexp) {
  Operands of("linear_cross_entropy");
  const LinearCrossEntropyArgs args =
      head_and_loss(of, x, weight, bias, targets, ignore_index, label_smoothing, block);
  const Tensor to_losses = of("losses", losses);
  const Tensor to_logsumexp = of("logsumexp", logsumexp);
  const Lease ctx(of.device());
  return hand_over(*ctx, krait::linear_cross_entropy(*ctx, args), to_losses, to_logsumexp);
}

Totals linear_cross_entropy_backward(Given x, Given weight, Given bias, Given targets,
                                     std::int64_t ignore_index, double label_smoothing, std::int64_t block,
                                     double scale, Given dx, Given dweight, Given dbias, Given losses,
                                     Given logsumexp) {
  Operands of("linear_cross_entropy_backward");
  const LinearCrossEntropyBackwardArgs args{
      .forward = head_and_loss(of, x, weight, bias, targets, ignore_index, label_smoothing, block),
      .scale = scale,
      .dx = of("dx", dx),
      .dweight = of("dweight", dweight),
      .dbias = of("dbias", dbias)};
  const Tensor to_losses = of("losses", losses);
  const Tensor to_logsumexp = of("logsumexp", logsumexp);
  const Lease ctx(of.device());
  return hand_over(*ctx, krait::linear_cross_entropy_backward(*ctx, args), to_losses, to_logsumexp);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(cross_entropy, krait::ffi::cross_entropy)
KRAIT_FFI(cross_entropy_backward, krait::ffi::cross_entropy_backward)
KRAIT_FFI(linear_cross_entropy, krait::ffi::linear_cross_entropy)
KRAIT_FFI(linear_cross_entropy_backward, krait::ffi::linear_cross_entropy_backward)
