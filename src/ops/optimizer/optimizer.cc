#include "krait/ops/optimizer.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/build.h"
#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/optimizer/kernels.h"

namespace krait {
namespace {

namespace detail = optimizer_detail;

// Elements handed out at a time: long enough for the memory's stride, short enough for even shares.
constexpr std::int64_t kPiece = 1 << 16;

struct Piece {
  std::size_t tensor;
  std::int64_t begin;
  std::int64_t end;
};

// Cuts tensors of the given sizes into pieces, whatever the number of threads.
template <typename SizeOf>
std::vector<Piece> pieces_of(std::size_t count, const SizeOf& size_of_tensor) {
  std::vector<Piece> pieces;
  for (std::size_t t = 0; t < count; ++t)
    for (std::int64_t begin = 0; begin < size_of_tensor(t); begin += kPiece)
      pieces.push_back({t, begin, std::min(begin + kPiece, size_of_tensor(t))});
  return pieces;
}

void check(const Context& ctx, const Tensor& t, const Tensor& like, std::string_view op,
           std::string_view name, std::size_t i) {
  const bool fits = t.defined() && t.dtype() == DType::f32 && t.is_contiguous() && t.shape() == like.shape();
  // Without working out what a message would say: a GPU waits for it.
  if (fits && t.device() == ctx.device()) [[likely]]
    return;
  require(fits, "[", op, "] ", name, " of tensor ", i, " is ",
          t.defined() ? concat(t.dtype(), " ", t.shape()) : "absent",
          t.defined() && !t.is_contiguous() ? " with gaps" : "", ", expected contiguous f32 ", like.shape());
  require(t.device() == ctx.device(), "[", op, "] ", name, " of tensor ", i, " is on ", name_of(t.device()),
          ", expected ", name_of(ctx.device()));
}

void check_share(double value, std::string_view op, std::string_view name) {
  require(value >= 0.0 && value < 1.0, "[", op, "] ", name, " is ", value,
          ", expected at least 0 and less than 1");
}

void check_rate(double value, std::string_view op, std::string_view name) {
  require(value >= 0.0 && std::isfinite(value), "[", op, "] ", name, " is ", value,
          ", expected a finite number of at least 0");
}

void round_into(const Tensor& compute, const float* from, std::int64_t begin, std::int64_t end) {
  if (compute.dtype() == DType::bf16) {
    auto* to = compute.data<bf16>();
    for (std::int64_t i = begin; i < end; ++i) to[i] = static_cast<bf16>(from[i]);
  } else {
    auto* to = compute.data<f16>();
    for (std::int64_t i = begin; i < end; ++i) to[i] = static_cast<f16>(from[i]);
  }
}

}  // namespace

void adamw(Context& ctx, const AdamWArgs& args) {
  constexpr std::string_view kOp = "adamw";
  require(args.step >= 1, "[adamw] step is ", args.step, ", expected 1 or more");
  check_share(args.beta1, kOp, "beta1");
  check_share(args.beta2, kOp, "beta2");
  check_rate(args.lr, kOp, "lr");
  check_rate(args.eps, kOp, "eps");
  check_rate(args.weight_decay, kOp, "weight_decay");
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    const AdamWTensor& t = args.tensors[i];
    check(ctx, t.parameter, t.parameter, kOp, "parameter", i);
    check(ctx, t.gradient, t.parameter, kOp, "gradient", i);
    check(ctx, t.m, t.parameter, kOp, "m", i);
    check(ctx, t.v, t.parameter, kOp, "v", i);
    if (t.compute)
      require((t.compute.dtype() == DType::bf16 || t.compute.dtype() == DType::f16) &&
                  t.compute.is_contiguous() && t.compute.shape() == t.parameter.shape(),
              "[adamw] compute of tensor ", i, " is ", t.compute.dtype(), " ", t.compute.shape(),
              ", expected contiguous bf16 or f16 ", t.parameter.shape());
    require_on_device(ctx, kOp, {{"compute", t.compute}});
  }
  const auto count = static_cast<double>(args.step);
  const detail::AdamWStep step{
      .beta1 = static_cast<float>(args.beta1),
      .beta2 = static_cast<float>(args.beta2),
      .rate = static_cast<float>(args.lr / (1.0 - std::pow(args.beta1, count))),
      .correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(args.beta2, count))),
      .eps = static_cast<float>(args.eps),
      .decay = 1.0F,
      .scale = static_cast<float>(args.gradient_scale)};
  const auto decay = static_cast<float>(1.0 - args.lr * args.weight_decay);
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      detail::cuda_adamw(ctx, step, decay, args.tensors);
      ctx.set_backend(kOp, "cuda");
      return;
    }
  }
  const auto pieces =
      pieces_of(args.tensors.size(), [&](std::size_t i) { return args.tensors[i].parameter.numel(); });
  parallel_for_dynamic(ctx, static_cast<std::int64_t>(pieces.size()), [&](std::int64_t index) {
    const Piece& piece = pieces[static_cast<std::size_t>(index)];
    const AdamWTensor& t = args.tensors[piece.tensor];
    detail::AdamWStep own = step;
    if (t.decay) own.decay = decay;
    float* parameter = t.parameter.data<float>();
    detail::adamw(own, t.gradient.data<float>() + piece.begin, parameter + piece.begin,
                  t.m.data<float>() + piece.begin, t.v.data<float>() + piece.begin, piece.end - piece.begin);
    if (t.compute) round_into(t.compute, parameter, piece.begin, piece.end);
  });
  ctx.set_backend(kOp, simd_target());
}

double global_norm(Context& ctx, std::span<const Tensor> tensors) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    check(ctx, tensors[i], tensors[i], "global_norm", "element", i);
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      ctx.set_backend("global_norm", "cuda");
      return std::sqrt(detail::cuda_sum_of_squares(ctx, tensors));
    }
  }
  const auto pieces = pieces_of(tensors.size(), [&](std::size_t i) { return tensors[i].numel(); });
  std::vector<double> sums(pieces.size());
  parallel_for_dynamic(ctx, static_cast<std::int64_t>(pieces.size()), [&](std::int64_t index) {
    const Piece& piece = pieces[static_cast<std::size_t>(index)];
    sums[static_cast<std::size_t>(index)] =
        detail::sum_of_squares(tensors[piece.tensor].data<float>() + piece.begin, piece.end - piece.begin);
  });
  double sum = 0.0;
  for (const double part : sums) sum += part;
  ctx.set_backend("global_norm", simd_target());
  return std::sqrt(sum);
}

void update_average(Context& ctx, std::span<const AveragedTensor> tensors, double decay) {
  check_share(decay, "update_average", "decay");
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check(ctx, tensors[i].parameter, tensors[i].parameter, "update_average", "parameter", i);
    check(ctx, tensors[i].average, tensors[i].parameter, "update_average", "average", i);
  }
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      detail::cuda_update_average(ctx, static_cast<float>(decay), tensors);
      ctx.set_backend("update_average", "cuda");
      return;
    }
  }
  const auto pieces = pieces_of(tensors.size(), [&](std::size_t i) { return tensors[i].parameter.numel(); });
  parallel_for_dynamic(ctx, static_cast<std::int64_t>(pieces.size()), [&](std::int64_t index) {
    const Piece& piece = pieces[static_cast<std::size_t>(index)];
    const AveragedTensor& t = tensors[piece.tensor];
    detail::average(static_cast<float>(decay), t.parameter.data<float>() + piece.begin,
                    t.average.data<float>() + piece.begin, piece.end - piece.begin);
  });
  ctx.set_backend("update_average", simd_target());
}

}  // namespace krait
