#include "krait/ops/norm.h"

#include <algorithm>
#include <string_view>

#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/norm/kernels.h"

namespace krait {
namespace norm_kernels {

Rows::Rows(const Tensor& t)
    : data_(static_cast<std::byte*>(t.raw())), dtype_(t.dtype()), channel_stride_(t.stride(-1)) {
  const auto bytes = static_cast<std::int64_t>(size_of(t.dtype()));
  for (int d = 0; d + 1 < t.ndim(); ++d) {
    const std::int64_t size = t.shape()[d];
    const std::int64_t stride = t.strides()[d] * bytes;
    if (size == 1) continue;
    const int last = sizes_.size() - 1;
    if (last >= 0 && strides_[last] == size * stride) {
      sizes_[last] *= size;
      strides_[last] = stride;
    } else {
      sizes_.push_back(size);
      strides_.push_back(stride);
    }
  }
}

void* Rows::row(std::int64_t index) const {
  std::byte* at = data_;
  for (int d = sizes_.size() - 1; d > 0; --d) {
    at += index % sizes_[d] * strides_[d];
    index /= sizes_[d];
  }
  return sizes_.empty() ? at : at + index * strides_[0];
}

}  // namespace norm_kernels

namespace {

using norm_kernels::Problem;
using norm_kernels::Rows;

void require_float(std::string_view op, std::string_view name, const Tensor& t) {
  require(is_float(t.dtype()), "[", op, "] ", name, " has dtype ", t.dtype(),
          ", expected f32, f64, bf16 or f16");
}

void require_like_x(std::string_view op, std::string_view name, const Tensor& t, const Tensor& x) {
  if (!t) return;
  require(t.shape() == x.shape(), "[", op, "] ", name, " has shape ", t.shape(), ", expected ", x.shape(),
          ": that of x");
  require_float(op, name, t);
}

void require_channels(std::string_view op, std::string_view name, const Tensor& t, std::int64_t channels) {
  if (!t) return;
  require(t.shape() == Dims{channels}, "[", op, "] ", name, " has shape ", t.shape(), ", expected ",
          Dims{channels}, ": one value per channel");
  require_float(op, name, t);
}

void validate(std::string_view op, const NormArgs& args) {
  require(args.x.defined(), "[", op, "] x is missing");
  require(args.x.ndim() >= 1, "[", op, "] x has shape ", args.x.shape(), ", expected (..., C)");
  require_float(op, "x", args.x);
  const std::int64_t channels = args.x.size(-1);
  require_channels(op, "weight", args.weight, channels);
  require_channels(op, "bias", args.bias, channels);
  require_like_x(op, "residual", args.residual, args.x);
  require_like_x(op, "z", args.z, args.x);
  require_like_x(op, "out", args.out, args.x);
  require_like_x(op, "residual_out", args.residual_out, args.x);
  require(args.eps >= 0, "[", op, "] eps is ", args.eps, ", expected 0 or more");
  require(args.group_size >= 0 && (args.group_size == 0 || channels % args.group_size == 0), "[", op,
          "] group_size is ", args.group_size, ", expected a divisor of the ", channels, " channels");
}

bool any_f64(const NormArgs& args, const NormResult& result) {
  const auto wide = [](const Tensor& t) { return t && t.dtype() == DType::f64; };
  return wide(args.x) || wide(args.weight) || wide(args.bias) || wide(args.residual) || wide(args.z) ||
         wide(result.out) || wide(result.residual);
}

bool use_simd(const Context& ctx, std::string_view op, const NormArgs& args, const NormResult& result) {
  const bool wide = any_f64(args, result);
  if (args.path == NormPath::simd)
    require(!wide, "[", op, "] the simd path has no f64, expected f32, bf16 or f16");
  return args.path == NormPath::simd || (args.path == NormPath::automatic && !ctx.reference() && !wide);
}

DType residual_dtype(const NormArgs& args) {
  if (args.residual_in_fp32) return DType::f32;
  return args.residual ? args.residual.dtype() : args.x.dtype();
}

Rows rows_of(const Tensor& t) { return t ? Rows(t) : Rows(); }

void run_simd(Context& ctx, Problem problem, const NormArgs& args) {
  // weight and bias are read once for each row: as f32, side by side.
  const Tensor weight = args.weight ? args.weight.to(DType::f32).contiguous() : Tensor();
  const Tensor bias = args.bias ? args.bias.to(DType::f32).contiguous() : Tensor();
  problem.weight = rows_of(weight);
  problem.bias = rows_of(bias);
  constexpr std::int64_t kElementsForThread = 16384;
  const std::int64_t grain = std::max<std::int64_t>(1, kElementsForThread / problem.channels);
  const std::int64_t parts = std::clamp<std::int64_t>(problem.rows / grain, 1, ctx.threads());
  const std::int64_t floats = norm_kernels::workspace_floats(problem.channels);
  const Tensor workspace = ctx.empty({parts, floats});
  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part)
      norm_kernels::simd(problem, problem.rows * part / parts, problem.rows * (part + 1) / parts,
                         workspace.data<float>() + part * floats);
  });
}

NormResult run(Context& ctx, NormKind kind, const NormArgs& args, std::string_view op) {
  validate(op, args);
  NormResult result;
  result.out = args.out ? args.out : ctx.empty(args.x.shape(), args.x.dtype());
  if (args.residual_out)
    result.residual = args.residual_out;
  else if (args.prenorm)
    result.residual = ctx.empty(args.x.shape(), residual_dtype(args));
  const bool simd = use_simd(ctx, op, args, result);
  ctx.set_backend(op, simd ? "simd" : "reference");
  if (args.x.numel() == 0) return result;

  const std::int64_t channels = args.x.size(-1);
  const Problem problem{.kind = kind,
                        .rows = args.x.numel() / channels,
                        .channels = channels,
                        .group_size = args.group_size == 0 ? channels : args.group_size,
                        .eps = args.eps,
                        .norm_before_gate = args.norm_before_gate,
                        .x = Rows(args.x),
                        .residual = rows_of(args.residual),
                        .z = rows_of(args.z),
                        .weight = rows_of(args.weight),
                        .bias = rows_of(args.bias),
                        .out = Rows(result.out),
                        .residual_out = rows_of(result.residual)};
  if (simd)
    run_simd(ctx, problem, args);
  else
    norm_kernels::reference(problem);
  return result;
}

}  // namespace

NormResult norm(Context& ctx, NormKind kind, const NormArgs& args) {
  return run(ctx, kind, args, kind == NormKind::rms ? "rms_norm" : "layer_norm");
}

NormResult rms_norm(Context& ctx, const NormArgs& args) { return norm(ctx, NormKind::rms, args); }

NormResult layer_norm(Context& ctx, const NormArgs& args) { return norm(ctx, NormKind::layer, args); }

}  // namespace krait
