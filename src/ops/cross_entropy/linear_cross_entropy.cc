// Head and loss over blocks of tokens, so that the logits of a long sequence never exist at once.
#include <algorithm>

#include "core/build.h"
#include "krait/core/error.h"
#include "krait/ops/cross_entropy.h"
#include "krait/ops/linear.h"
#include "ops/cross_entropy/kernels.h"
#include "ops/gpu_dtypes.h"

namespace krait {
namespace {

// Every block of logits reads the weight, so there are few: of at most about 64 MiB of f32 logits on the CPU
// and 544 MiB on a GPU, and of equal size.
std::int64_t choose_block(const Context& ctx, std::int64_t count, std::int64_t vocabulary) {
  const std::int64_t logits = ctx.on_gpu() ? std::int64_t{136} << 20 : std::int64_t{1} << 24;
  const std::int64_t limit = ctx.on_gpu() ? 8192 : 1024;
  const std::int64_t most =
      std::clamp<std::int64_t>(logits / std::max<std::int64_t>(vocabulary, 1), 64, limit);
  const std::int64_t blocks = std::max<std::int64_t>((count + most - 1) / most, 1);
  return (count + blocks - 1) / blocks;
}

struct Gradients {
  double scale = 1.0;
  Tensor dx;
  Tensor dweight;
  Tensor dbias;
  bool read_later = false;

  [[nodiscard]] bool wanted() const { return dx || dweight || dbias; }
};

void check_gradient(const Tensor& t, const Tensor& like, bool added, const char* name, const char* op) {
  if (!t) return;
  require(like.defined() && t.shape() == like.shape(), "[", op, "] ", name, " has shape ", t.shape(),
          ", expected ", like.shape());
  require(is_float(t.dtype()) && (!added || t.dtype() == DType::f32 || t.dtype() == DType::f64), "[", op,
          "] ", name, " has dtype ", t.dtype(), ", expected f32", added ? "" : ", bf16, f16");
}

// Losses of a block and, where dlogits is given, their gradient: on a GPU in one launch.
const char* with_gradient(Context& ctx, const cross_entropy_detail::Rows& rows, const Tensor& dlogits,
                          double scale, const Tensor& bad) {
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      cross_entropy_detail::cuda(ctx, rows, dlogits, scale, bad);
      return "cuda";
    }
  }
  const char* path = cross_entropy_detail::run(ctx, rows);
  if (dlogits)
    cross_entropy_detail::run_backward(ctx, {.logits = rows.logits,
                                             .targets = rows.targets,
                                             .ignore_index = rows.ignore_index,
                                             .label_smoothing = rows.label_smoothing,
                                             .scale = scale,
                                             .logsumexp = rows.logsumexp,
                                             .dlogits = dlogits});
  return path;
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
  const std::initializer_list<NamedTensor> tensors{
      {"x", args.x},        {"weight", args.weight},        {"bias", args.bias},
      {"dx", gradients.dx}, {"dweight", gradients.dweight}, {"dbias", gradients.dbias}};
  require_on_device(ctx, op, tensors);
  if (ctx.on_gpu()) require_gpu_floats(op, tensors);
  const Tensor targets = detail::checked_targets(ctx, args.targets, count, vocabulary, args.ignore_index, op);

  const bool f64 = args.x.dtype() == DType::f64 || args.weight.dtype() == DType::f64;
  const DType dtype = f64 ? DType::f64 : DType::f32;
  CrossEntropyResult result{.losses = ctx.empty({count}, dtype), .logsumexp = ctx.empty({count}, dtype)};
  const std::int64_t block =
      std::min(args.block > 0 ? args.block : choose_block(ctx, count, vocabulary), count);
  // Rows on the boundary of a vector.
  constexpr std::int64_t kVector = 8;
  const std::int64_t width = ctx.on_gpu() ? (vocabulary + kVector - 1) / kVector * kVector : vocabulary;
  const Tensor logits = ctx.empty({block, width}, dtype).slice(1, 0, vocabulary);
  // The products of the gradient are those of bf16 where the head is bf16; elsewhere it takes the logits'
  // place.
  const bool rounded = ctx.on_gpu() && gradients.wanted() && args.x.dtype() == DType::bf16 &&
                       args.weight.dtype() == DType::bf16;
  // Those products take two blocks at once, which are half of the f32 logits' size: with the sums over the
  // vocabulary, dx has as many tiles as a GPU has multiprocessors only where there are many tokens.
  const std::int64_t span = rounded ? std::min(2 * block, count) : block;
  const Tensor dlogits = rounded ? ctx.empty({span, width}, DType::bf16).slice(1, 0, vocabulary) : logits;
  Tensor bad;
  if constexpr (kWithCuda)
    if (ctx.on_gpu() && gradients.wanted())
      bad = detail::cuda_count_bad(ctx, targets, vocabulary, args.ignore_index);
  const char* path = "simd";
  for (std::int64_t first = 0; first < count; first += span) {
    const std::int64_t last = std::min(first + span, count);
    for (std::int64_t begin = first; begin < last; begin += block) {
      const std::int64_t end = std::min(begin + block, last);
      const detail::Rows rows{.logits = logits.slice(0, 0, end - begin),
                              .targets = targets.slice(0, begin, end),
                              .ignore_index = args.ignore_index,
                              .label_smoothing = args.label_smoothing,
                              .losses = result.losses.slice(0, begin, end),
                              .logsumexp = result.logsumexp.slice(0, begin, end)};
      linear(
          ctx,
          {.x = args.x.slice(0, begin, end), .weight = args.weight, .bias = args.bias, .out = rows.logits});
      const Tensor gradient = gradients.wanted() ? dlogits.slice(0, begin - first, end - first) : Tensor();
      path = with_gradient(ctx, rows, gradient, gradients.scale, bad);
    }
    if (!gradients.wanted()) continue;
    const Tensor gradient = dlogits.slice(0, 0, last - first);
    // The weight's gradient before x's, which may take the place of x.
    linear_backward(ctx, {.x = args.x.slice(0, first, last),
                          .dout = gradient,
                          .dweight = gradients.dweight,
                          .dbias = gradients.dbias});
    if (gradients.dx)
      linear_backward(ctx,
                      {.weight = args.weight, .dout = gradient, .dx = gradients.dx.slice(0, first, last)});
  }
  detail::finish(ctx, targets, vocabulary, args.ignore_index, op, result, gradients.read_later);
  ctx.set_backend(op, concat(path, ", blocks of ", block));
  return result;
}

}  // namespace

CrossEntropyResult linear_cross_entropy(Context& ctx, const LinearCrossEntropyArgs& args) {
  return run_blocks(ctx, args, {}, "linear_cross_entropy");
}

CrossEntropyResult linear_cross_entropy_backward(Context& ctx, const LinearCrossEntropyBackwardArgs& args) {
  return run_blocks(ctx, args.forward,
                    {.scale = args.scale,
                     .dx = args.dx,
                     .dweight = args.dweight,
                     .dbias = args.dbias,
                     .read_later = args.read_later},
                    "linear_cross_entropy_backward");
}

}  // namespace krait
