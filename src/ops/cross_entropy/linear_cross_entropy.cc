// Head and loss over blocks of tokens, so that the logits of a long sequence never exist at once.
#include <algorithm>

#include "krait/core/error.h"
#include "krait/ops/cross_entropy.h"
#include "krait/ops/linear.h"
#include "ops/cross_entropy/kernels.h"

namespace krait {
namespace {

// Enough tokens that packing the weight is little beside the product, in about 32 MiB of f32 logits.
std::int64_t choose_block(std::int64_t vocabulary) {
  constexpr std::int64_t kLogits = std::int64_t{1} << 23;
  return std::clamp<std::int64_t>(kLogits / std::max<std::int64_t>(vocabulary, 1), 64, 1024);
}

}  // namespace

CrossEntropyResult linear_cross_entropy(Context& ctx, const LinearCrossEntropyArgs& args) {
  namespace detail = cross_entropy_detail;
  constexpr const char* kOp = "linear_cross_entropy";
  require(args.x.defined(), "[", kOp, "] x is absent");
  require(args.weight.defined(), "[", kOp, "] weight is absent");
  require(args.x.ndim() == 2, "[", kOp, "] x has shape ", args.x.shape(), ", expected (T, d)");
  require(args.weight.ndim() == 2 && args.weight.size(1) == args.x.size(1), "[", kOp, "] weight has shape ",
          args.weight.shape(), ", expected (V, ", args.x.size(1), "): x has shape ", args.x.shape());
  require(args.block >= 0, "[", kOp, "] block is ", args.block, ", expected 0 (chosen) or more");
  detail::check_smoothing(args.label_smoothing, kOp);
  const std::int64_t count = args.x.size(0);
  const std::int64_t vocabulary = args.weight.size(0);
  const auto targets = detail::checked_targets(args.targets, count, vocabulary, args.ignore_index, kOp);

  const bool f64 = args.x.dtype() == DType::f64 || args.weight.dtype() == DType::f64;
  const DType dtype = f64 ? DType::f64 : DType::f32;
  CrossEntropyResult result{.losses = ctx.empty({count}, dtype), .logsumexp = ctx.empty({count}, dtype)};
  const std::int64_t block = std::min(args.block > 0 ? args.block : choose_block(vocabulary), count);
  const Tensor logits = ctx.empty({block, vocabulary}, dtype);
  const char* path = "simd";
  for (std::int64_t begin = 0; begin < count; begin += block) {
    const std::int64_t end = std::min(begin + block, count);
    const Tensor part = logits.slice(0, 0, end - begin);
    linear(ctx, {.x = args.x.slice(0, begin, end), .weight = args.weight, .bias = args.bias, .out = part});
    path = detail::run(ctx, {.logits = part,
                             .targets = std::span(targets).subspan(static_cast<std::size_t>(begin),
                                                                   static_cast<std::size_t>(end - begin)),
                             .ignore_index = args.ignore_index,
                             .label_smoothing = args.label_smoothing,
                             .losses = result.losses.slice(0, begin, end),
                             .logsumexp = result.logsumexp.slice(0, begin, end)});
  }
  detail::finish(targets, args.ignore_index, result);
  ctx.set_backend(kOp, concat(path, ", blocks of ", block));
  return result;
}

}  // namespace krait
