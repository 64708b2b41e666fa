// The discrete form of ssd (Listing 1 of the paper) and the conversions between the two forms.
#include <utility>

#include "krait/core/error.h"
#include "krait/ops/ssd.h"
#include "ops/ssd/problem.h"

namespace krait {
namespace {

void check_form(std::string_view op, std::string_view name, const Tensor& t, const Dims& shape) {
  require(t.defined(), "[", op, "] ", name, " is missing");
  require(is_float(t.dtype()), "[", op, "] ", name, " has dtype ", t.dtype(),
          ", expected f32, f64, bf16 or f16");
  require(t.shape() == shape, "[", op, "] ", name, " has shape ", t.shape(), ", expected ", shape);
}

// The conversions are for looking at small problems.
void check_on_cpu(const Context& ctx, std::string_view op) {
  require(!ctx.on_gpu(), "[", op, "] is for the CPU, the context is on ", name_of(ctx.device()));
}

DType widest(const Tensor& a, const Tensor& b, const Tensor& c) {
  const bool wide = a.dtype() == DType::f64 || b.dtype() == DType::f64 || c.dtype() == DType::f64;
  return wide ? DType::f64 : DType::f32;
}

// rows (B, L, H, P) with each row of P multiplied by its factor (B, L, H), in f64.
Tensor scaled(const Tensor& rows, const Tensor& factors) {
  const Tensor result = rows.to(DType::f64).clone();
  double* value = result.data<double>();
  for (std::int64_t i = 0; i < factors.numel(); ++i)
    for (std::int64_t p = 0; p < rows.size(3); ++p) *value++ *= factors.data<double>()[i];
  return result;
}

Tensor rounded(Context& ctx, const Tensor& wide, DType dtype) {
  Tensor result = ctx.empty(wide.shape(), dtype);
  result.copy_from(wide);
  return result;
}

}  // namespace

std::pair<Tensor, Tensor> ssd_minimal_discrete(Context& ctx, const Tensor& X, const Tensor& A,
                                               const Tensor& B, const Tensor& C, std::int64_t block_len,
                                               const Tensor& initial_states) {
  constexpr std::string_view op = "ssd_minimal_discrete";
  require_on_device(ctx, op, {{"X", X}, {"A", A}, {"B", B}, {"C", C}, {"initial_states", initial_states}});
  require(!ctx.on_gpu() || !X || X.dtype() != DType::f64, "[", op,
          "] X has dtype f64, expected f32, bf16 or f16 on a GPU");
  require(X.defined(), "[", op, "] X is missing");
  require(X.ndim() == 4, "[", op, "] X has shape ", X.shape(), ", expected (B, L, H, P)");
  require(B.defined() && B.ndim() == 4, "[", op, "] B must have 4 dimensions, (B, L, H, N)");
  check_form(op, "X", X, X.shape());
  check_form(op, "A", A, {X.size(0), X.size(1), X.size(2)});
  check_form(op, "B", B, {X.size(0), X.size(1), X.size(2), B.size(3)});
  check_form(op, "C", C, B.shape());
  require(block_len >= 1, "[", op, "] block_len is ", block_len, ", expected 1 or more");
  if (initial_states)
    check_form(op, "initial_states", initial_states, {X.size(0), 1, X.size(2), X.size(3), B.size(3)});
  for (const Tensor* t : {&A, &B, &C, &initial_states})
    require(!*t || t->dtype() != DType::f64 || X.dtype() == DType::f64, "[", op,
            "] a tensor of f64 beside X of ", X.dtype(), ": f64 needs X in f64 too");

  const SsdResult result =
      ssd_detail::run(ctx, op,
                      {.x = X,
                       .dt = A,
                       .B = B,
                       .C = C,
                       .initial_states = initial_states ? initial_states.select(1, 0) : Tensor(),
                       .discrete = true},
                      {.final_states = true, .chunk_size = block_len});
  return {result.out, result.final_states};
}

DiscreteSsm ssd_discretize(Context& ctx, const Tensor& x, const Tensor& d, const Tensor& A) {
  constexpr std::string_view op = "ssd_discretize";
  check_on_cpu(ctx, op);
  require(x.defined() && x.ndim() == 4, "[", op, "] x must have 4 dimensions, (B, L, H, P)");
  check_form(op, "x", x, x.shape());
  check_form(op, "d", d, {x.size(0), x.size(1), x.size(2)});
  check_form(op, "A", A, {x.size(2)});
  const DType dtype = widest(x, d, A);
  const Tensor steps = d.to(DType::f64).contiguous();
  const Tensor rates = A.to(DType::f64).contiguous();
  const Tensor exponents = steps.clone();
  for (std::int64_t i = 0; i < exponents.numel(); ++i)
    exponents.data<double>()[i] *= rates.data<double>()[i % x.size(2)];
  return {rounded(ctx, scaled(x, steps), dtype), rounded(ctx, exponents, dtype)};
}

DiscreteSsm ssd_undiscretize(Context& ctx, const Tensor& X, const Tensor& A, const Tensor& d) {
  constexpr std::string_view op = "ssd_undiscretize";
  check_on_cpu(ctx, op);
  require(X.defined() && X.ndim() == 4, "[", op, "] X must have 4 dimensions, (B, L, H, P)");
  check_form(op, "X", X, X.shape());
  check_form(op, "A", A, {X.size(0), X.size(1), X.size(2)});
  check_form(op, "d", d, A.shape());
  const DType dtype = widest(X, A, d);
  const Tensor inverse = d.to(DType::f64).clone();
  const Tensor rates = A.to(DType::f64).clone();
  for (std::int64_t i = 0; i < inverse.numel(); ++i) {
    double& step = inverse.data<double>()[i];
    require(step != 0.0, "[ssd_undiscretize] d is 0 for head ", i % d.size(2), " of token ",
            i / d.size(2) % d.size(1), " of row ", i / d.size(2) / d.size(1),
            ": x and A cannot be recovered");
    rates.data<double>()[i] /= step;
    step = 1.0 / step;
  }
  return {rounded(ctx, scaled(X, inverse), dtype), rounded(ctx, rates, dtype)};
}

}  // namespace krait
