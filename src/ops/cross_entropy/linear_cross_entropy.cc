// Head and loss over blocks of tokens, so that the logits of a long sequence never exist at once.
#include <algorithm>

#include "krait/core/error.h"
#include "krait/ops/cross_entropy.h"
#include "krait/ops/linear.h"
#include "ops/cross_entropy/kernels.h"

namespace krait {
namespace {

// Every block reads the weight twice and its gradient once or more, so there are few: of at most about 64 MiB
// of f32 logits, and of equal size.
std::int64_t choose_block(std::int64_t count, std::int64_t vocabulary) {
  constexpr std::int64_t kLogits = std::int64_t{1} << 24;
  const std::int64_t most =
      std::clamp<std::int64_t>(kLogits / std::max<std::int64_t>(vocabulary, 1), 64, 1024);
  const std::int64_t blocks = std::max<std::int64_t>((count + most - 1) / most, 1);
  return (count + blocks - 1) / blocks;
}

}  // namespace

namespace {

struct Gradients {
  double scale = 1.0;
  Tensor dx;
  Tensor dweight;
  Tensor dbias;

  [[nodiscard]] bool wanted() const { return dx || dweight || dbias; }
};

void check_gradient(const Tensor& t, const Tensor& like, bool added, const char* name, const char* op) {
  if (!t) return;
  require(like.defined() && t.shape() == like.shape(), "[", op, "] ", name, " has shape ", t.shape(),
          ", expected ", like.shape());
  require(is_float(t.dtype()) && (!added || t.dtype() == DType::f32 || t.dtype() == DType::f64), "[", op,
          "] ", name, " has dtype ", t.dtype(), ", expected f32", added ? "" : ", bf16, f16");
}

// Blocks of tokens one after the other; the gradients of a block follow its losses while its logits exist.
CrossEntropyResult run_blocks(Context& ctx, const LinearCrossEntropyArgs& args, const Gradients& gradients,
                              const char* op) {
  namespace detail = cross_entropy_detail;
  require(args.x.defined(), "[", op, "] x is absent");
  require(args.weight.defined(), "[", op, "] weight is absent");
  require(args.x.ndim() == 2, "[", op, "] x has shape ", args.x.shape(), ", expected (T, d)");
  require(args.weight.ndim() == 2 && args.weight.size(1) == args.x.size(1), "[", op, "] weight has shape ",
          args.weight.shape(), ", expected (V, ", args.x.size(1), "): x has shape ", args.x.shape());
  require(args.block >= 0, "[", op, "] block is ", args.block, ", expected 0 (chosen) or more");
  check_gradient(gradients.dx, args.x, false, "dx", op);
  check_gradient(gradients.dweight, args.weight, true, "dweight", op);
  check_gradient(gradients.dbias, args.bias, true, "dbias", op);
  detail::check_smoothing(args.label_smoothing, op);
  const std::int64_t count = args.x.size(0);
  const std::int64_t vocabulary = args.weight.size(0);
  const auto targets = detail::checked_targets(args.targets, count, vocabulary, args.ignore_index, op);

  const bool f64 = args.x.dtype() == DType::f64 || args.weight.dtype() == DType::f64;
  const DType dtype = f64 ? DType::f64 : DType::f32;
  CrossEntropyResult result{.losses = ctx.empty({count}, dtype), .logsumexp = ctx.empty({count}, dtype)};
  const std::int64_t block = std::min(args.block > 0 ? args.block : choose_block(count, vocabulary), count);
  const Tensor logits = ctx.empty({block, vocabulary}, dtype);
  const char* path = "simd";
  for (std::int64_t begin = 0; begin < count; begin += block) {
    const std::int64_t end = std::min(begin + block, count);
    const Tensor part = logits.slice(0, 0, end - begin);
    const Tensor x = args.x.slice(0, begin, end);
    const auto own =
        std::span(targets).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    linear(ctx, {.x = x, .weight = args.weight, .bias = args.bias, .out = part});
    path = detail::run(ctx, {.logits = part,
                             .targets = own,
                             .ignore_index = args.ignore_index,
                             .label_smoothing = args.label_smoothing,
                             .losses = result.losses.slice(0, begin, end),
                             .logsumexp = result.logsumexp.slice(0, begin, end)});
    if (!gradients.wanted()) continue;
    detail::run_backward(ctx, {.logits = part,
                               .targets = own,
                               .ignore_index = args.ignore_index,
                               .label_smoothing = args.label_smoothing,
                               .scale = gradients.scale,
                               .logsumexp = result.logsumexp.slice(0, begin, end),
                               .dlogits = part});
    // The weight's gradient before x's, which may take the place of x.
    linear_backward(ctx, {.x = x, .dout = part, .dweight = gradients.dweight, .dbias = gradients.dbias});
    if (gradients.dx)
      linear_backward(ctx, {.weight = args.weight, .dout = part, .dx = gradients.dx.slice(0, begin, end)});
  }
  detail::finish(targets, args.ignore_index, result);
  ctx.set_backend(op, concat(path, ", blocks of ", block));
  return result;
}

}  // namespace

CrossEntropyResult linear_cross_entropy(Context& ctx, const LinearCrossEntropyArgs& args) {
  return run_blocks(ctx, args, {}, "linear_cross_entropy");
}

CrossEntropyResult linear_cross_entropy_backward(Context& ctx, const LinearCrossEntropyBackwardArgs& args) {
  return run_blocks(ctx, args.forward,
                    {.scale = args.scale, .dx = args.dx, .dweight = args.dweight, .dbias = args.dbias},
                    "linear_cross_entropy_backward");
}

}  // namespace krait
