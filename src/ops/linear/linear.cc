#include "krait/ops/linear.h"

#include "core/build.h"
#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/linear/kernels.h"
#include "ops/overlap.h"

namespace krait {
namespace {

using linear_detail::Problem;

Dims shape_of_out(const Tensor& x, std::int64_t out) {
  Dims shape = x.shape();
  shape[x.ndim() - 1] = out;
  return shape;
}

void check_dtype(const Tensor& t, const char* name) {
  require(is_float(t.dtype()), "[linear] ", name, " has dtype ", t.dtype(),
          ", expected f32, bf16, f16, or f64 in the reference");
}

void validate(const LinearArgs& args) {
  require(args.x.defined(), "[linear] x is absent");
  require(args.weight.defined(), "[linear] weight is absent");
  check_dtype(args.x, "x");
  check_dtype(args.weight, "weight");
  require(args.weight.ndim() == 2, "[linear] weight has shape ", args.weight.shape(), ", expected (out, in)");
  const std::int64_t out = args.weight.size(0);
  const std::int64_t in = args.weight.size(1);
  require(args.x.ndim() >= 1 && args.x.size(-1) == in, "[linear] x has shape ", args.x.shape(),
          ", expected (..., ", in, "): weight has shape ", args.weight.shape());
  if (args.bias) {
    check_dtype(args.bias, "bias");
    require(args.bias.shape() == Dims{out}, "[linear] bias has shape ", args.bias.shape(), ", expected ",
            Dims{out}, ": weight has shape ", args.weight.shape());
  }
  if (args.out) {
    check_dtype(args.out, "out");
    require(args.out.shape() == shape_of_out(args.x, out), "[linear] out has shape ", args.out.shape(),
            ", expected ", shape_of_out(args.x, out));
  }
  require(args.out || !args.accumulate, "[linear] accumulate is set without an out to add to");
  if (args.addend) {
    check_dtype(args.addend, "addend");
    require(!args.accumulate, "[linear] both accumulate and addend are given, expected one");
    require(args.addend.shape() == shape_of_out(args.x, out), "[linear] addend has shape ",
            args.addend.shape(), ", expected ", shape_of_out(args.x, out));
  }
}

bool any_f64(const LinearArgs& args) {
  const auto is_f64 = [](const Tensor& t) { return t && t.dtype() == DType::f64; };
  return is_f64(args.x) || is_f64(args.weight) || is_f64(args.bias) || is_f64(args.out) ||
         is_f64(args.addend);
}

LinearPath path_of(const Context& ctx, const LinearArgs& args, std::int64_t rows) {
  const Tensor& weight = args.weight;
  const bool f64 = any_f64(args);
  const OnednnProducts products = onednn_products();
  switch (args.path) {
    case LinearPath::automatic: break;
    case LinearPath::reference: return LinearPath::reference;
    case LinearPath::gemv:
      require(!f64, "[linear] the path gemv was asked for a product with f64; only the reference has it");
      require(weight.stride(1) == 1 || weight.size(1) <= 1,
              "[linear] the path gemv was asked for a weight whose ", "strides are ", weight.strides(),
              "; it needs rows without gaps (stride 1)");
      return LinearPath::gemv;
    case LinearPath::gemm:
      require(!f64, "[linear] the path gemm was asked for a product with f64; only the reference has it");
      return LinearPath::gemm;
    case LinearPath::onednn:
      require(products != OnednnProducts::none, "[linear] the path onednn is not in this build");
      require(!f64, "[linear] the path onednn was asked for a product with f64; only the reference has it");
      require(weight.dtype() == DType::f32 ||
                  (weight.dtype() == DType::bf16 && products == OnednnProducts::f32_and_bf16),
              "[linear] the path onednn was asked for a weight of dtype ", weight.dtype(), "; expected f32",
              products == OnednnProducts::f32_and_bf16 ? " or bf16" : " on this processor");
      require(linear_detail::without_gaps(weight),
              "[linear] the path onednn was asked for a weight whose strides are ", weight.strides(),
              "; one of them must be 1");
      return LinearPath::onednn;
    case LinearPath::cublaslt:
    case LinearPath::plain:
      fail(ErrorKind::invalid_argument, "[linear] the paths cublaslt and plain are those of a GPU, this is ",
           name_of(ctx.device()));
  }
  if (ctx.reference() || f64) return LinearPath::reference;
  LinearPath path = choose_linear_path(rows, weight.size(1), weight.size(0), weight.dtype(), products);
  if (path == LinearPath::gemv && weight.stride(1) != 1) path = LinearPath::gemm;
  if (path == LinearPath::onednn && !linear_detail::without_gaps(weight)) path = LinearPath::gemm;
  return path;
}

void run(Context& ctx, const Problem& problem, LinearPath path) {
  switch (path) {
    case LinearPath::automatic:
    case LinearPath::reference:
      linear_detail::reference(ctx, problem);
      ctx.set_backend("linear", "reference");
      return;
    case LinearPath::gemv:
      linear_detail::gemv(ctx, problem);
      ctx.set_backend("linear", concat("gemv (", simd_target(), ")"));
      return;
    case LinearPath::gemm:
      linear_detail::gemm(ctx, problem);
      ctx.set_backend("linear", concat("gemm (", simd_target(), ")"));
      return;
    case LinearPath::onednn:
#ifdef KRAIT_HAVE_ONEDNN
      linear_detail::onednn(ctx, problem);
#endif
      ctx.set_backend("linear", concat("onednn (", onednn_version(), ")"));
      return;
    case LinearPath::cublaslt:
    case LinearPath::plain: return;  // path_of has refused them
  }
}

void run_on_gpu([[maybe_unused]] Context& ctx, [[maybe_unused]] Problem p, [[maybe_unused]] LinearPath path) {
  if constexpr (kWithCuda) {
    namespace gpu = linear_detail::gpu;
    if (path == LinearPath::automatic) {
      path = choose_gpu_linear_path(p.x.size(0), p.weight.size(1), p.weight.size(0), p.weight.dtype());
      // gemv reads rows of weights, cuBLASLt columns too.
      const bool by_columns = p.weight.stride(1) != 1 && p.weight.stride(0) == 1;
      if (path == LinearPath::gemv && by_columns) path = LinearPath::cublaslt;
    }
    if (p.addend && path != LinearPath::cublaslt) {
      ctx.copy(p.addend, p.out);
      p.addend = {};
      p.accumulate = true;
    }
    switch (path) {
      case LinearPath::gemv:
        if (gpu::few_rows(ctx, p)) {
          ctx.set_backend("linear", "cuda few rows");
          return;
        }
        gpu::gemv(ctx, p);
        ctx.set_backend("linear", "cuda gemv");
        return;
      case LinearPath::plain:
        gpu::plain(ctx, p);
        ctx.set_backend("linear", "cuda plain");
        return;
      case LinearPath::cublaslt:
        if (p.accumulate && gpu::add_short_sums(ctx, p)) {
          ctx.set_backend("linear", "cuda short sums");
          return;
        }
        ctx.set_backend("linear", gpu::cublaslt(ctx, p) ? "cublaslt" : "cuda plain");
        return;
      default:
        fail(ErrorKind::invalid_argument, "[linear] a path of the CPU was asked for on ",
             name_of(ctx.device()), ", expected automatic, gemv, cublaslt or plain");
    }
  }
}

}  // namespace

#ifndef KRAIT_HAVE_ONEDNN
const char* onednn_version() { return ""; }
OnednnProducts onednn_products() { return OnednnProducts::none; }
#endif

LinearPath choose_linear_path(std::int64_t rows, std::int64_t in, std::int64_t out, DType weight,
                              OnednnProducts onednn) {
  if (rows <= 16) return LinearPath::gemv;
  // Below 64 rows oneDNN divides bf16 products badly among many threads, and making a primitive costs
  // more than a small product does.
  const bool large = rows >= 64 && in * out >= 65536;
  if (weight == DType::bf16 && onednn == OnednnProducts::f32_and_bf16 && large) return LinearPath::onednn;
  return LinearPath::gemm;
}

LinearPath choose_gpu_linear_path(std::int64_t rows, std::int64_t in, std::int64_t out, DType /*weight*/) {
  if (in == 0 || out == 0) return LinearPath::plain;
  return rows <= 16 ? LinearPath::gemv : LinearPath::cublaslt;
}

std::optional<Tensor> linear_detail::rows_view(const Tensor& t) {
  const int last = t.ndim() - 1;
  std::int64_t rows = 1;
  std::int64_t stride = t.size(last);
  for (int i = last - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (rows == 1) {
      stride = t.stride(i);
    } else if (t.stride(i) != stride * rows) {
      return std::nullopt;
    }
    rows *= t.size(i);
  }
  return t.as_strided({rows, t.size(last)}, {stride, t.stride(last)}, 0);
}

Tensor linear_detail::as_rows(Context& ctx, const Tensor& t) {
  if (const auto rows = rows_view(t)) return *rows;
  return *rows_view(ctx.clone(t));
}

bool linear_detail::without_gaps(const Tensor& t) {
  return (t.stride(1) == 1 && t.stride(0) >= t.size(1)) || (t.stride(0) == 1 && t.stride(1) >= t.size(0));
}

Tensor linear_detail::operand(Context& ctx, const Tensor& t, DType dtype) {
  if (t.dtype() == dtype && without_gaps(t)) return t;
  const Tensor copy = ctx.empty(t.shape(), dtype);
  if (ctx.on_gpu()) {
    ctx.copy(t, copy);
    return copy;
  }
  parallel_for(ctx, t.size(0), 16, [&](std::int64_t begin, std::int64_t end) {
    copy.slice(0, begin, end).copy_from(t.slice(0, begin, end));
  });
  return copy;
}

Tensor linear_detail::bias_as_f32(Context& ctx, const Tensor& bias) {
  if (!bias || (bias.dtype() == DType::f32 && bias.is_contiguous())) return bias;
  const Tensor wide = ctx.empty(bias.shape());
  wide.copy_from(bias);
  return wide;
}

Tensor linear(Context& ctx, const LinearArgs& args) {
  validate(args);
  require_on_device(ctx, "linear",
                    {{"x", args.x},
                     {"weight", args.weight},
                     {"bias", args.bias},
                     {"out", args.out},
                     {"addend", args.addend}});
  require(!ctx.on_gpu() || !any_f64(args), "[linear] f64 runs on the CPU alone, this is ",
          name_of(ctx.device()));
  Tensor out = args.out ? args.out
                        : ctx.empty(shape_of_out(args.x, args.weight.size(0)),
                                    args.addend ? args.addend.dtype() : args.x.dtype());
  if (out.numel() == 0) return out;
  const bool in_place = args.addend && same_view(args.addend, out);
  require(!args.addend || in_place || !may_overlap(args.addend, out),
          "[linear] addend overlaps out, expected the same view or another memory");

  // Leading sizes that no single stride describes are copied, which is little beside the product.
  Problem problem{.x = linear_detail::as_rows(ctx, args.x),
                  .weight = args.weight,
                  .bias = args.bias,
                  .accumulate = args.accumulate || in_place};
  const auto out_rows = linear_detail::rows_view(out);
  Tensor gathered;
  if (out_rows) {
    problem.out = *out_rows;
  } else {
    gathered = ctx.empty(out.shape(), out.dtype());
    if (problem.accumulate) ctx.copy(out, gathered);
    problem.out = *linear_detail::rows_view(gathered);
  }
  if (args.addend && !in_place) {
    const auto addend = linear_detail::rows_view(args.addend);
    if (ctx.on_gpu() && addend) {
      problem.addend = *addend;
    } else {
      ctx.copy(args.addend, gathered ? gathered : out);
      problem.accumulate = true;
    }
  }
  if (ctx.on_gpu())
    run_on_gpu(ctx, problem, args.path);
  else
    run(ctx, problem, path_of(ctx, args, problem.x.size(0)));
  if (gathered) ctx.copy(gathered, out);
  return out;
}

}  // namespace krait
