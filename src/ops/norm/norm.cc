#include "krait/ops/norm.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string_view>

#include "core/build.h"
#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/gpu_dtypes.h"
#include "ops/norm/kernels.h"
#include "ops/overlap.h"

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

using norm_kernels::BackwardProblem;
using norm_kernels::Normalisation;
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

void require_normalisation(std::string_view op, double eps, std::int64_t group_size, std::int64_t channels) {
  require(eps >= 0, "[", op, "] eps is ", eps, ", expected 0 or more");
  require(group_size >= 0 && (group_size == 0 || channels % group_size == 0), "[", op, "] group_size is ",
          group_size, ", expected a divisor of the ", channels, " channels");
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
  require_normalisation(op, args.eps, args.group_size, channels);
}

void require_sum(std::string_view op, std::string_view name, const Tensor& t, std::int64_t channels) {
  require_channels(op, name, t, channels);
  require(!t || t.dtype() == DType::f32 || t.dtype() == DType::f64, "[", op, "] ", name, " has dtype ",
          t.dtype(), ", expected f32: it is added to");
}

void validate(std::string_view op, const NormBackwardArgs& args) {
  require(args.x.defined(), "[", op, "] x is missing");
  require(args.dout.defined(), "[", op, "] dout is missing");
  require(args.x.ndim() >= 1, "[", op, "] x has shape ", args.x.shape(), ", expected (..., C)");
  require_float(op, "x", args.x);
  const std::int64_t channels = args.x.size(-1);
  require_channels(op, "weight", args.weight, channels);
  require_channels(op, "bias", args.bias, channels);
  require_like_x(op, "z", args.z, args.x);
  require_like_x(op, "dout", args.dout, args.x);
  require_like_x(op, "dresidual", args.dresidual, args.x);
  require_like_x(op, "dx", args.dx, args.x);
  require_like_x(op, "dx_rounded", args.dx_rounded, args.x);
  require(!args.dx_rounded || args.dx, "[", op, "] dx_rounded is wanted, but there is no dx");
  require_like_x(op, "dz", args.dz, args.x);
  require(!args.dz || args.z, "[", op, "] dz is wanted, but there is no z");
  require_sum(op, "dweight", args.dweight, channels);
  require_sum(op, "dbias", args.dbias, channels);
  require_normalisation(op, args.eps, args.group_size, channels);
  require_apart(op, "dx", args.dx, "dout", args.dout, true);
  require_apart(op, "dx", args.dx, "dresidual", args.dresidual, true);
  require_apart(op, "dx", args.dx, "x", args.x);
  require_apart(op, "dx", args.dx, "z", args.z);
  require_apart(op, "dx", args.dx, "dz", args.dz);
  for (const auto& [name, other] : std::initializer_list<NamedTensor>{{"x", args.x},
                                                                      {"z", args.z},
                                                                      {"dout", args.dout},
                                                                      {"dresidual", args.dresidual},
                                                                      {"dx", args.dx},
                                                                      {"dz", args.dz}})
    require_apart(op, "dx_rounded", args.dx_rounded, name, other);
  require_apart(op, "dz", args.dz, "dout", args.dout, true);
  require_apart(op, "dz", args.dz, "z", args.z, true);
  require_apart(op, "dz", args.dz, "x", args.x);
  require_apart(op, "dz", args.dz, "dresidual", args.dresidual);
  require_apart(op, "dweight", args.dweight, "dbias", args.dbias);
}

bool any_f64(std::initializer_list<Tensor> tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t && t.dtype() == DType::f64; });
}

void require_gpu(std::string_view op, NormPath path, std::initializer_list<NamedTensor> tensors) {
  require(path == NormPath::automatic, "[", op, "] path is one of the CPU's, expected automatic on a GPU");
  require_gpu_floats(op, tensors);
}

bool use_simd(const Context& ctx, std::string_view op, NormPath path, bool wide) {
  if (path == NormPath::simd)
    require(!wide, "[", op, "] the simd path has no f64, expected f32, bf16 or f16");
  return path == NormPath::simd || (path == NormPath::automatic && !ctx.reference() && !wide);
}

DType residual_dtype(const NormArgs& args) {
  if (args.residual_in_fp32) return DType::f32;
  return args.residual ? args.residual.dtype() : args.x.dtype();
}

Rows rows_of(const Tensor& t) { return t ? Rows(t) : Rows(); }

template <typename Args>
Normalisation normalisation_of(NormKind kind, const Args& args) {
  const std::int64_t channels = args.x.size(-1);
  return {.kind = kind,
          .rows = args.x.numel() / channels,
          .channels = channels,
          .group_size = args.group_size == 0 ? channels : args.group_size,
          .eps = args.eps,
          .norm_before_gate = args.norm_before_gate,
          .x = Rows(args.x),
          .z = rows_of(args.z),
          .weight = rows_of(args.weight),
          .bias = rows_of(args.bias)};
}

void run_simd(Context& ctx, Problem problem, const NormArgs& args) {
  // weight and bias are read once for each row: as f32, side by side.
  const Tensor weight = args.weight ? args.weight.to(DType::f32).contiguous() : Tensor();
  const Tensor bias = args.bias ? args.bias.to(DType::f32).contiguous() : Tensor();
  problem.weight = rows_of(weight);
  problem.bias = rows_of(bias);
  constexpr std::int64_t kElementsForThread = 16384;
  const std::int64_t grain = std::max<std::int64_t>(1, kElementsForThread / problem.channels);
  const std::int64_t parts = std::clamp<std::int64_t>(problem.rows / grain, 1, ctx.threads());
  const std::int64_t floats = norm_kernels::kForwardRows * norm_kernels::padded(problem.channels);
  const Tensor workspace = ctx.empty({parts, floats});
  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part)
      norm_kernels::simd(problem, problem.rows * part / parts, problem.rows * (part + 1) / parts,
                         workspace.data<float>() + part * floats);
  });
}

NormResult run(Context& ctx, NormKind kind, const NormArgs& args, std::string_view op) {
  validate(op, args);
  require_on_device(ctx, op,
                    {{"x", args.x},
                     {"weight", args.weight},
                     {"bias", args.bias},
                     {"residual", args.residual},
                     {"z", args.z},
                     {"out", args.out},
                     {"residual_out", args.residual_out}});
  NormResult result;
  result.out = args.out ? args.out : ctx.empty(args.x.shape(), args.x.dtype());
  if (args.residual_out)
    result.residual = args.residual_out;
  else if (args.prenorm)
    result.residual = ctx.empty(args.x.shape(), residual_dtype(args));
  bool simd = false;
  if (ctx.on_gpu()) {
    require_gpu(op, args.path,
                {{"x", args.x},
                 {"weight", args.weight},
                 {"bias", args.bias},
                 {"residual", args.residual},
                 {"z", args.z},
                 {"out", result.out},
                 {"residual_out", result.residual}});
    ctx.set_backend(op, "cuda");
  } else {
    simd = use_simd(
        ctx, op, args.path,
        any_f64({args.x, args.weight, args.bias, args.residual, args.z, result.out, result.residual}));
    ctx.set_backend(op, simd ? "simd" : "reference");
  }
  if (args.x.numel() == 0) return result;

  Problem problem{normalisation_of(kind, args)};
  problem.residual = rows_of(args.residual);
  problem.out = Rows(result.out);
  problem.residual_out = rows_of(result.residual);
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      // To the kernels a residual stream that gives activations of 16 bits is a residual without x.
      const bool alone = !args.z && !args.residual && !result.residual;
      if (alone && args.x.dtype() == DType::f32 && result.out.dtype() != DType::f32)
        std::swap(problem.x, problem.residual);
      norm_kernels::cuda(ctx, problem, norm_kernels::choose_gpu_plan(problem));
      return result;
    }
  }
  if (simd)
    run_simd(ctx, problem, args);
  else
    norm_kernels::reference(problem);
  return result;
}

// A padded row of f32, as the backward reads weight and bias.
Tensor padded_row(Context& ctx, const Tensor& t) {
  if (!t) return {};
  const std::int64_t channels = t.size(0);
  const Tensor row = ctx.zeros({norm_kernels::padded(channels)});
  row.slice(0, 0, channels).copy_from(t);
  return row;
}

// to += the sums of all blocks, block by block: `partial` is (blocks, padded).
void add_partial_sums(Context& ctx, const Tensor& partial, const Tensor& to) {
  constexpr std::int64_t kChannels = 256;
  const std::int64_t channels = to.size(0);
  parallel_for(ctx, (channels + kChannels - 1) / kChannels, 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t piece = begin; piece < end; ++piece) {
      const std::int64_t first = piece * kChannels;
      const std::int64_t count = std::min(kChannels, channels - first);
      std::array<float, kChannels> sums{};
      for (std::int64_t block = 0; block < partial.size(0); ++block) {
        const float* from = partial.data<float>() + block * partial.stride(0) + first;
        for (std::int64_t c = 0; c < count; ++c) sums[static_cast<std::size_t>(c)] += from[c];
      }
      float* destination = to.data<float>() + first * to.stride(0);
      for (std::int64_t c = 0; c < count; ++c)
        destination[c * to.stride(0)] += sums[static_cast<std::size_t>(c)];
    }
  });
}

void run_simd(Context& ctx, BackwardProblem problem, const NormBackwardArgs& args) {
  const Tensor weight = padded_row(ctx, args.weight);
  const Tensor bias = padded_row(ctx, args.bias);
  problem.weight = rows_of(weight);
  problem.bias = rows_of(bias);
  // Rows are summed in blocks whose number depends on the shape alone.
  constexpr std::int64_t kBlockRows = 32;
  constexpr std::int64_t kMaxBlocks = 256;
  const std::int64_t blocks = std::clamp<std::int64_t>(problem.rows / kBlockRows, 1, kMaxBlocks);
  const std::int64_t width = norm_kernels::padded(problem.channels);
  const Tensor dweight = args.dweight ? ctx.empty({blocks, width}) : Tensor();
  const Tensor dbias = args.dbias ? ctx.empty({blocks, width}) : Tensor();
  const auto sums_of = [&](const Tensor& sums, std::int64_t block) {
    return sums ? sums.data<float>() + block * width : nullptr;
  };
  const std::int64_t parts = std::min<std::int64_t>(blocks, ctx.threads());
  const Tensor workspace = ctx.empty({parts, norm_kernels::kBackwardRows * width});
  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part)
      for (std::int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
        norm_kernels::simd(problem, problem.rows * block / blocks, problem.rows * (block + 1) / blocks,
                           sums_of(dweight, block), sums_of(dbias, block),
                           workspace.data<float>() + part * workspace.stride(0));
  });
  if (dweight) add_partial_sums(ctx, dweight, args.dweight);
  if (dbias) add_partial_sums(ctx, dbias, args.dbias);
}

}  // namespace

NormResult norm(Context& ctx, NormKind kind, const NormArgs& args) {
  return run(ctx, kind, args, kind == NormKind::rms ? "rms_norm" : "layer_norm");
}

NormResult rms_norm(Context& ctx, const NormArgs& args) { return norm(ctx, NormKind::rms, args); }

NormResult layer_norm(Context& ctx, const NormArgs& args) { return norm(ctx, NormKind::layer, args); }

void norm_backward(Context& ctx, NormKind kind, const NormBackwardArgs& args) {
  const std::string_view op = kind == NormKind::rms ? "rms_norm_backward" : "layer_norm_backward";
  validate(op, args);
  const std::initializer_list<NamedTensor> tensors{{"x", args.x},
                                                   {"weight", args.weight},
                                                   {"bias", args.bias},
                                                   {"z", args.z},
                                                   {"dout", args.dout},
                                                   {"dresidual", args.dresidual},
                                                   {"dx", args.dx},
                                                   {"dz", args.dz},
                                                   {"dweight", args.dweight},
                                                   {"dbias", args.dbias},
                                                   {"dx_rounded", args.dx_rounded}};
  require_on_device(ctx, op, tensors);
  bool simd = false;
  if (ctx.on_gpu()) {
    require_gpu(op, args.path, tensors);
    ctx.set_backend(op, "cuda");
  } else {
    simd = use_simd(ctx, op, args.path,
                    any_f64({args.x, args.weight, args.bias, args.z, args.dout, args.dresidual, args.dx,
                             args.dz, args.dweight, args.dbias}));
    ctx.set_backend(op, simd ? "simd" : "reference");
  }
  if (args.x.numel() == 0) return;
  if (!args.dx && !args.dz && !args.dweight && !args.dbias) return;

  BackwardProblem problem{normalisation_of(kind, args)};
  problem.dout = Rows(args.dout);
  problem.dresidual = rows_of(args.dresidual);
  problem.dx = rows_of(args.dx);
  problem.dz = rows_of(args.dz);
  problem.dweight = rows_of(args.dweight);
  problem.dbias = rows_of(args.dbias);
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      problem.dx_rounded = rows_of(args.dx_rounded);
      const norm_kernels::GpuPlan plan = norm_kernels::choose_gpu_plan(problem);
      if (norm_kernels::cuda(ctx, problem, plan) || !args.dx_rounded) return;
      return ctx.copy(args.dx, args.dx_rounded);
    }
  }
  if (simd)
    run_simd(ctx, problem, args);
  else
    norm_kernels::reference(problem);
  if (args.dx_rounded) args.dx_rounded.copy_from(args.dx);
}

}  // namespace krait
