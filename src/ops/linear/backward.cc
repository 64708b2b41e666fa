// linear_backward: the two products of the gradients are those of the forward on transposed views,
//   dx (rows, in) = dout (rows, out) by W^T, the weight of a layer from `out` to `in`;
//   dW (out, in) += dout^T by x^T, a layer from `rows` to `in` applied to `out` rows.
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
  return path == LinearPath::reference ? "reference" : path == LinearPath::onednn ? "onednn" : "gemm";
}

}  // namespace

LinearPath linear_detail::choose_backward_path(std::int64_t rows, std::int64_t in, std::int64_t out,
                                               DType weight, OnednnProducts onednn) {
  const LinearPath path = choose_linear_path(rows, in, out, weight, onednn);
  return path == LinearPath::gemv ? LinearPath::gemm : path;
}

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  validate(args);
  Tensor dout = linear_detail::as_rows(ctx, args.dout);
  const LinearPath path = path_of(ctx, args, dout.size(0));
  if (args.dbias && path == LinearPath::reference) linear_detail::column_sums_reference(dout, args.dbias);
  if (args.dbias && path != LinearPath::reference) linear_detail::column_sums(ctx, dout, args.dbias);

  // oneDNN multiplies operands of one dtype, the weight's.
  Tensor x = args.dweight ? linear_detail::as_rows(ctx, args.x) : Tensor();
  if (path == LinearPath::onednn && (args.dx || args.dweight)) {
    const DType stored = args.weight ? args.weight.dtype() : dout.dtype();
    dout = linear_detail::operand(ctx, dout, stored);
    if (x) x = linear_detail::operand(ctx, x, stored);
  }
  if (args.dx) {
    const Dims leading = args.dx.shape();
    const auto rows = linear_detail::rows_view(args.dx);
    const Tensor dx = rows ? *rows : ctx.empty({dout.size(0), args.dx.size(-1)}, args.dx.dtype());
    if (!rows && args.accumulate_dx) dx.view(leading).copy_from(args.dx);
    linear(ctx, {.x = dout,
                 .weight = args.weight.transpose(0, 1),
                 .out = dx,
                 .accumulate = args.accumulate_dx,
                 .path = path});
    if (!rows) args.dx.copy_from(dx.view(leading));
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
