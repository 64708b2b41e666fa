#include "krait/ops/activation.h"

#include <algorithm>
#include <array>
#include <string_view>

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

template <typename T, typename S>
void load(const Tensor& t, std::int64_t offset, std::int64_t n, S* to) {
  const T* from = static_cast<const T*>(t.raw()) + offset;
  const std::int64_t stride = t.stride(-1);
  for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<S>(from[i * stride]);
}

// Rows are staged in f32 (f64 for f64 tensors) pieces that stay in the first-level cache; contiguous f32
// rows are worked on where they are.
template <typename Row, typename Element>
void for_rows(const Context& ctx, const Tensor& a_in, const Tensor& b_in, const Tensor& out_in, bool simd,
              const Row& row, const Element& element) {
  constexpr std::int64_t kPiece = 512;
  const Tensor a = as_rows(a_in);
  const Tensor b = as_rows(b_in);
  const Tensor out = as_rows(out_in);
  const std::int64_t n = a.size(-1);
  if (a.numel() == 0) return;
  const auto direct = [](const Tensor& t) {
    return t.dtype() == DType::f32 && (t.stride(-1) == 1 || t.size(-1) == 1);
  };
  const bool in_place = direct(a) && direct(b) && direct(out);
  parallel_for(
      ctx, a.numel() / n, std::max<std::int64_t>(1, 16384 / n), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
          const std::int64_t ra = row_offset(a, r);
          const std::int64_t rb = row_offset(b, r);
          const std::int64_t ro = row_offset(out, r);
          if (simd && in_place) {
            row(a.data<float>() + ra, b.data<float>() + rb, out.data<float>() + ro, n);
            continue;
          }
          for (std::int64_t at = 0; at < n; at += kPiece) {
            const std::int64_t m = std::min(kPiece, n - at);
            const auto staged = [&](auto tag) {
              using S = typename decltype(tag)::type;
              std::array<S, kPiece> x;
              std::array<S, kPiece> y;
              dispatch_float(a.dtype(), "x", [&](auto t) {
                load<typename decltype(t)::type>(a, ra + at * a.stride(-1), m, x.data());
              });
              dispatch_float(b.dtype(), "gate", [&](auto t) {
                load<typename decltype(t)::type>(b, rb + at * b.stride(-1), m, y.data());
              });
              if constexpr (std::is_same_v<S, float>) {
                if (simd) row(x.data(), y.data(), x.data(), m);
              }
              if (!simd)
                for (std::int64_t i = 0; i < m; ++i)
                  x[static_cast<std::size_t>(i)] =
                      static_cast<S>(element(x[static_cast<std::size_t>(i)], y[static_cast<std::size_t>(i)]));
              dispatch_float(out.dtype(), "out", [&](auto t) {
                using To = typename decltype(t)::type;
                To* to = static_cast<To*>(out.raw()) + ro + at * out.stride(-1);
                for (std::int64_t i = 0; i < m; ++i)
                  to[i * out.stride(-1)] = static_cast<To>(x[static_cast<std::size_t>(i)]);
              });
            };
            if (a.dtype() == DType::f64 || !simd)
              staged(TypeTag<double>{});
            else
              staged(TypeTag<float>{});
          }
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
           [](auto x, auto g) { return activation::gated_silu_reference<double>(x, g); });
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
      [kind](auto x, auto) { return activation::gelu_reference<double>(x, kind); });
  ctx.set_backend("gelu", simd ? "simd" : "reference");
  return out;
}

}  // namespace krait
