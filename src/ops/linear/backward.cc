// linear_backward: the two products of the gradients are those of the forward on transposed views,
//   dx (rows, in) = dout (rows, out) by W^T, the weight of a layer from `out` to `in`;
//   dW (out, in) += dout^T by x^T, a layer from `rows` to `in` applied to `out` rows.
#include "core/build.h"
#include "krait/core/error.h"
#include "krait/ops/linear.h"
#include "ops/linear/kernels.h"

namespace krait {
namespace {

constexpr const char* kOp = "linear_backward";

void check_dtype(const Tensor& t, const char* name) {
  require(is_float(t.dtype()), "[", kOp, "] ", name, " has dtype ", t.dtype(),
          ", expected f32, bf16, f16, or f64 in the reference");
}

void check_sum_dtype(const Tensor& t, const char* name) {
  require(t.dtype() == DType::f32 || t.dtype() == DType::f64, "[", kOp, "] ", name, " has dtype ", t.dtype(),
          ", expected f32, or f64 in the reference: gradients are added up in it");
}

Dims shape_of_x(const Tensor& dout, std::int64_t in) {
  Dims shape = dout.shape();
  shape[dout.ndim() - 1] = in;
  return shape;
}

void validate(const LinearBackwardArgs& args) {
  require(args.dout.defined(), "[", kOp, "] dout is absent");
  check_dtype(args.dout, "dout");
  require(args.dout.ndim() >= 1, "[", kOp, "] dout has shape (), expected (..., out)");
  const std::int64_t out = args.dout.size(-1);
  require(args.weight || !args.dx, "[", kOp, "] dx is asked for without weight");
  require(args.x || !args.dweight, "[", kOp, "] dweight is asked for without x");
  require(args.dx || !args.accumulate_dx, "[", kOp, "] accumulate_dx is set without a dx to add to");
  if (args.weight) {
    check_dtype(args.weight, "weight");
    require(args.weight.ndim() == 2 && args.weight.size(0) == out, "[", kOp, "] weight has shape ",
            args.weight.shape(), ", expected (", out, ", in): dout has shape ", args.dout.shape());
  }
  if (args.x) {
    check_dtype(args.x, "x");
    require(args.x.ndim() == args.dout.ndim(), "[", kOp, "] x has shape ", args.x.shape(),
            ", expected that of dout, ", args.dout.shape(), ", but for the last size");
    const std::int64_t in = args.weight ? args.weight.size(1) : args.x.size(-1);
    const Dims expected = shape_of_x(args.dout, in);
    require(args.x.shape() == expected, "[", kOp, "] x has shape ", args.x.shape(), ", expected ", expected,
            ": dout has shape ", args.dout.shape());
  }
  if (args.dx) {
    check_dtype(args.dx, "dx");
    const Dims expected = shape_of_x(args.dout, args.weight.size(1));
    require(args.dx.shape() == expected, "[", kOp, "] dx has shape ", args.dx.shape(), ", expected ",
            expected);
  }
  if (args.dweight) {
    check_sum_dtype(args.dweight, "dweight");
    const Dims expected{out, args.x.size(-1)};
    require(args.dweight.shape() == expected, "[", kOp, "] dweight has shape ", args.dweight.shape(),
            ", expected ", expected);
  }
  if (args.dbias) {
    check_sum_dtype(args.dbias, "dbias");
    require(args.dbias.shape() == Dims{out}, "[", kOp, "] dbias has shape ", args.dbias.shape(),
            ", expected ", Dims{out});
  }
}

bool any_f64(const LinearBackwardArgs& args) {
  for (const Tensor* t : {&args.x, &args.weight, &args.dout, &args.dx, &args.dweight, &args.dbias})
    if (*t && t->dtype() == DType::f64) return true;
  return false;
}

LinearPath path_of(const Context& ctx, const LinearBackwardArgs& args, std::int64_t rows) {
  const bool f64 = any_f64(args);
  if (ctx.on_gpu()) {
    require(!f64, "[", kOp, "] f64 runs on the CPU alone, this is ", name_of(ctx.device()));
    require(args.path == LinearPath::automatic || args.path == LinearPath::cublaslt ||
                args.path == LinearPath::plain,
            "[", kOp, "] a path that it does not have on ", name_of(ctx.device()),
            " was asked for, expected automatic, cublaslt or plain");
    return args.path == LinearPath::automatic ? LinearPath::cublaslt : args.path;
  }
  require(args.path != LinearPath::cublaslt && args.path != LinearPath::plain, "[", kOp,
          "] the paths cublaslt and plain are those of a GPU, this is ", name_of(ctx.device()));
  if (args.path != LinearPath::automatic) {
    require(args.path != LinearPath::gemv, "[", kOp, "] has no path gemv");
    require(!f64 || args.path == LinearPath::reference, "[", kOp, "] the path ",
            args.path == LinearPath::gemm ? "gemm" : "onednn",
            " was asked for a product with f64; only the reference has it");
    return args.path;
  }
  if (ctx.reference() || f64) return LinearPath::reference;
  if (args.weight && !linear_detail::without_gaps(args.weight)) return LinearPath::gemm;
  const std::int64_t in = args.weight ? args.weight.size(1) : args.x ? args.x.size(-1) : 0;
  const DType stored = args.weight ? args.weight.dtype() : args.dout.dtype();
  return linear_detail::choose_backward_path(rows, in, args.dout.size(-1), stored, onednn_products());
}

const char* name_of_path(LinearPath path) {
  switch (path) {
    case LinearPath::reference: return "reference";
    case LinearPath::onednn: return "onednn";
    case LinearPath::cublaslt: return "cublaslt";
    case LinearPath::plain: return "cuda plain";
    default: return "gemm";
  }
}

void add_column_sums(Context& ctx, LinearPath path, const Tensor& dout, const Tensor& dbias) {
  if (path == LinearPath::reference) return linear_detail::column_sums_reference(dout, dbias);
  if constexpr (kWithCuda)
    if (ctx.on_gpu()) return linear_detail::gpu::column_sums(ctx, dout, dbias);
  linear_detail::column_sums(ctx, dout, dbias);
}

// Whether the factors of both products have to be of one dtype, the weight's.
bool one_dtype(LinearPath path) { return path == LinearPath::onednn || path == LinearPath::cublaslt; }

}  // namespace

LinearPath linear_detail::choose_backward_path(std::int64_t rows, std::int64_t in, std::int64_t out,
                                               DType weight, OnednnProducts onednn) {
  const LinearPath path = choose_linear_path(rows, in, out, weight, onednn);
  return path == LinearPath::gemv ? LinearPath::gemm : path;
}

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  validate(args);
  require_on_device(ctx, kOp,
                    {{"x", args.x},
                     {"weight", args.weight},
                     {"dout", args.dout},
                     {"dx", args.dx},
                     {"dweight", args.dweight},
                     {"dbias", args.dbias}});
  Tensor dout = linear_detail::as_rows(ctx, args.dout);
  const LinearPath path = path_of(ctx, args, dout.size(0));
  if (args.dbias) add_column_sums(ctx, path, dout, args.dbias);

  Tensor x = args.dweight ? linear_detail::as_rows(ctx, args.x) : Tensor();
  if (one_dtype(path) && (args.dx || args.dweight)) {
    const DType stored = args.weight ? args.weight.dtype() : dout.dtype();
    dout = linear_detail::operand(ctx, dout, stored);
    if (x) x = linear_detail::operand(ctx, x, stored);
  }
  if (args.dx) {
    const Dims leading = args.dx.shape();
    const auto rows = linear_detail::rows_view(args.dx);
    const Tensor dx = rows ? *rows : ctx.empty({dout.size(0), args.dx.size(-1)}, args.dx.dtype());
    if (!rows && args.accumulate_dx) ctx.copy(args.dx, dx.view(leading));
    linear(ctx, {.x = dout,
                 .weight = args.weight.transpose(0, 1),
                 .out = dx,
                 .accumulate = args.accumulate_dx,
                 .path = path});
    if (!rows) ctx.copy(dx.view(leading), args.dx);
  }
  if (args.dweight) {
    linear(ctx, {.x = dout.transpose(0, 1),
                 .weight = x.transpose(0, 1),
                 .out = args.dweight,
                 .accumulate = true,
                 .path = path});
  }
  ctx.set_backend(kOp, name_of_path(path));
}

}  // namespace krait
