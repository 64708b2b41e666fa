#include "krait/ops/activation.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "core/convert.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/activation/kernels.h"

namespace krait {
namespace {

// Tensors of one shape as rows of their last dimension.
Tensor as_rows(const Tensor& t) {
  if (t.ndim() == 0) return t.unsqueeze(0).unsqueeze(0);
  return t.ndim() == 1 ? t.unsqueeze(0) : t;
}

std::int64_t row_offset(const Tensor& t, std::int64_t row) {
  std::int64_t offset = 0;
  for (int d = t.ndim() - 2; d >= 0; --d) {
    offset += row % t.shape()[d] * t.strides()[d];
    row /= t.shape()[d];
  }
  return offset;
}

template <typename S>
void load(const Tensor& t, std::int64_t offset, std::int64_t n, S* to) {
  dispatch_float(t.dtype(), "x", [&](auto tag) {
    const auto* from = static_cast<const typename decltype(tag)::type*>(t.raw()) + offset;
    for (std::int64_t i = 0; i < n; ++i) to[i] = convert<S>(from[i * t.stride(-1)]);
  });
}

template <typename S>
void store(const S* from, std::int64_t n, const Tensor& t, std::int64_t offset) {
  dispatch_float(t.dtype(), "out", [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* to = static_cast<T*>(t.raw()) + offset;
    for (std::int64_t i = 0; i < n; ++i) to[i * t.stride(-1)] = convert<T>(from[i]);
  });
}

// Pieces of rows that stay in the first-level cache.
constexpr std::int64_t kPiece = 512;

// One row through buffers of S: f32 for the kernels, f64 for the reference. `body` works on x in place.
template <typename S, typename Body>
void staged_row(const Tensor& a, std::int64_t ra, const Tensor& b, std::int64_t rb, const Tensor& out,
                std::int64_t ro, const Body& body) {
  std::array<S, kPiece> x;
  std::array<S, kPiece> y;
  const std::int64_t n = a.size(-1);
  for (std::int64_t at = 0; at < n; at += kPiece) {
    const std::int64_t m = std::min(kPiece, n - at);
    load(a, ra + at * a.stride(-1), m, x.data());
    load(b, rb + at * b.stride(-1), m, y.data());
    body(x.data(), y.data(), m);
    store(x.data(), m, out, ro + at * out.stride(-1));
  }
}

// row(x, gate, out, n) on f32; element(x, gate) on f64.
template <typename Row, typename Element>
void for_rows(const Context& ctx, const Tensor& a_in, const Tensor& b_in, const Tensor& out_in, bool simd,
              const Row& row, const Element& element) {
  const Tensor a = as_rows(a_in);
  const Tensor b = as_rows(b_in);
  const Tensor out = as_rows(out_in);
  if (a.numel() == 0) return;
  const std::int64_t n = a.size(-1);
  const auto direct = [&](const Tensor& t) {
    return t.dtype() == DType::f32 && (t.stride(-1) == 1 || n == 1);
  };
  const bool in_place = direct(a) && direct(b) && direct(out);
  parallel_for(
      ctx, a.numel() / n, std::max<std::int64_t>(1, 16384 / n), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
          const std::int64_t ra = row_offset(a, r);
          const std::int64_t rb = row_offset(b, r);
          const std::int64_t ro = row_offset(out, r);
          if (!simd)
            staged_row<double>(a, ra, b, rb, out, ro, [&](double* x, const double* y, std::int64_t m) {
              for (std::int64_t i = 0; i < m; ++i) x[i] = element(x[i], y[i]);
            });
          else if (in_place)
            row(a.data<float>() + ra, b.data<float>() + rb, out.data<float>() + ro, n);
          else
            staged_row<float>(a, ra, b, rb, out, ro,
                              [&](float* x, const float* y, std::int64_t m) { row(x, y, x, m); });
        }
      });
}

bool use_simd(const Context& ctx, ActivationPath path, const Tensor& x, std::string_view op) {
  if (path == ActivationPath::simd)
    require(x.dtype() != DType::f64, "[", op, "] the simd path has no f64, expected f32, bf16 or f16");
  return path == ActivationPath::simd ||
         (path == ActivationPath::automatic && !ctx.reference() && x.dtype() != DType::f64);
}

Tensor checked_out(Context& ctx, std::string_view op, const Tensor& x, const Tensor& out) {
  require(x.defined() && is_float(x.dtype()), "[", op, "] x has dtype ", x.dtype(),
          ", expected f32, f64, bf16 or f16");
  if (!out) return ctx.empty(x.shape(), x.dtype());
  require(out.shape() == x.shape(), "[", op, "] out has shape ", out.shape(), ", expected ", x.shape());
  require(is_float(out.dtype()), "[", op, "] out has dtype ", out.dtype(),
          ", expected f32, f64, bf16 or f16");
  return out;
}

}  // namespace

Tensor gated_silu(Context& ctx, const GatedSiluArgs& args) {
  Tensor out = checked_out(ctx, "gated_silu", args.x, args.out);
  require(args.gate.defined() && args.gate.shape() == args.x.shape(), "[gated_silu] gate has shape ",
          args.gate.shape(), ", expected ", args.x.shape());
  require(is_float(args.gate.dtype()), "[gated_silu] gate has dtype ", args.gate.dtype(),
          ", expected f32, f64, bf16 or f16");
  const bool simd = use_simd(ctx, args.path, args.x, "gated_silu");
  for_rows(ctx, args.x, args.gate, out, simd, activation::gated_silu_row,
           [](double x, double g) { return activation::gated_silu_reference<double>(x, g); });
  ctx.set_backend("gated_silu", simd ? "simd" : "reference");
  return out;
}

Tensor gelu(Context& ctx, const GeluArgs& args) {
  Tensor out = checked_out(ctx, "gelu", args.x, args.out);
  const bool simd = use_simd(ctx, args.path, args.x, "gelu");
  const GeluKind kind = args.kind;
  for_rows(
      ctx, args.x, args.x, out, simd,
      [kind](const float* x, const float*, float* o, std::int64_t n) { activation::gelu_row(x, o, n, kind); },
      [kind](double x, double) { return activation::gelu_reference<double>(x, kind); });
  ctx.set_backend("gelu", simd ? "simd" : "reference");
  return out;
}

}  // namespace krait
