#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/activation/cpu/activation_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "ops/activation/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::activation::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = krait::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// Applies `body` to whole vectors, then to the rest in a buffer of one vector.
template <typename Body>
void for_each_vector(const float* a, const float* b, float* out, std::int64_t n, const Body& body) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(body(hn::LoadU(d, a + i), hn::LoadU(d, b + i)), d, out + i);
  if (i == n) return;
  HWY_ALIGN float rest[3][HWY_MAX_BYTES / sizeof(float)] = {};
  for (std::int64_t j = i; j < n; ++j) {
    rest[0][j - i] = a[j];
    rest[1][j - i] = b[j];
  }
  hn::Store(body(hn::Load(d, rest[0]), hn::Load(d, rest[1])), d, rest[2]);
  for (std::int64_t j = i; j < n; ++j) out[j] = rest[2][j - i];
}

// The cumulative distribution of the standard normal, and exp(-x^2 / 2), from which its density follows.
// erf is the approximation 7.1.26 of Abramowitz and Stegun, with an absolute error below 2e-7.
HWY_INLINE V cumulative_normal(D d, V x, V& gauss) {
  const V y = hn::Abs(hn::Mul(x, hn::Set(d, 0.70710678F)));
  const V t = hn::Div(hn::Set(d, 1.0F), hn::MulAdd(y, hn::Set(d, 0.3275911F), hn::Set(d, 1.0F)));
  V p = hn::Set(d, 1.061405429F);
  p = hn::MulAdd(p, t, hn::Set(d, -1.453152027F));
  p = hn::MulAdd(p, t, hn::Set(d, 1.421413741F));
  p = hn::MulAdd(p, t, hn::Set(d, -0.284496736F));
  p = hn::MulAdd(p, t, hn::Set(d, 0.254829592F));
  gauss = simd::exp(d, hn::Neg(hn::Mul(y, y)));
  const V erf = hn::NegMulAdd(hn::Mul(p, t), gauss, hn::Set(d, 1.0F));
  return hn::Mul(hn::Set(d, 0.5F), hn::Add(hn::Set(d, 1.0F), hn::CopySign(erf, x)));
}

// sqrt(2 / pi) (x + 0.044715 x^3), doubled: 0.5 (1 + tanh(y)) = sigmoid(2 y).
constexpr float kTwiceScale = 1.5957691F;
constexpr float kCubic = 0.044715F;

void gated_silu_row(const float* x, const float* gate, float* out, std::int64_t n) {
  const D d;
  for_each_vector(x, gate, out, n, [d](V a, V g) HWY_ATTR { return hn::Mul(a, simd::silu(d, g)); });
}

void gelu_row(const float* x, float* out, std::int64_t n, GeluKind kind) {
  const D d;
  if (kind == GeluKind::exact) {
    for_each_vector(x, x, out, n, [d](V a, V) HWY_ATTR {
      V gauss = hn::Zero(d);
      return hn::Mul(a, cumulative_normal(d, a, gauss));
    });
    return;
  }
  for_each_vector(x, x, out, n, [d](V a, V) HWY_ATTR {
    const V cube = hn::Mul(hn::Mul(a, a), hn::Mul(a, hn::Set(d, kCubic)));
    return hn::Mul(a, simd::sigmoid(d, hn::Mul(hn::Set(d, kTwiceScale), hn::Add(a, cube))));
  });
}

void gated_silu_backward_row(const float* x, const float* gate, const float* dout, float* dx, float* dgate,
                             std::int64_t n) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto gradients = [d](V value, V g, V gradient, V& by_x, V& by_gate) HWY_ATTR {
    V slope = value;
    simd::silu_with_derivative(d, g, by_x, slope);
    by_x = hn::Mul(gradient, by_x);
    by_gate = hn::Mul(hn::Mul(gradient, value), slope);
  };
  V by_x = hn::Zero(d);
  V by_gate = by_x;
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    gradients(hn::LoadU(d, x + i), hn::LoadU(d, gate + i), hn::LoadU(d, dout + i), by_x, by_gate);
    hn::StoreU(by_x, d, dx + i);
    hn::StoreU(by_gate, d, dgate + i);
  }
  if (i < n) {
    const auto rest = static_cast<std::size_t>(n - i);
    gradients(simd::load_f32_n(d, x + i, rest), simd::load_f32_n(d, gate + i, rest),
              simd::load_f32_n(d, dout + i, rest), by_x, by_gate);
    simd::store_f32_n(d, by_x, dx + i, rest);
    simd::store_f32_n(d, by_gate, dgate + i, rest);
  }
}

void gelu_backward_row(const float* x, const float* dout, float* dx, std::int64_t n, GeluKind kind) {
  const D d;
  if (kind == GeluKind::exact) {
    for_each_vector(x, dout, dx, n, [d](V a, V gradient) HWY_ATTR {
      V gauss = hn::Zero(d);
      const V cumulative = cumulative_normal(d, a, gauss);
      const V density = hn::Mul(gauss, hn::Set(d, 0.39894228F));  // 1 / sqrt(2 pi)
      return hn::Mul(gradient, hn::MulAdd(a, density, cumulative));
    });
    return;
  }
  for_each_vector(x, dout, dx, n, [d](V unbounded, V gradient) HWY_ATTR {
    // Beyond 12 the slope is 0 or 1; the cube of much larger values would overflow.
    const V bound = hn::CopySign(hn::Set(d, 12.0F), unbounded);
    const V a = hn::IfThenElse(hn::Gt(hn::Abs(unbounded), hn::Abs(bound)), bound, unbounded);
    const V square = hn::Mul(a, a);
    const V twice = hn::Mul(hn::Mul(hn::Set(d, kTwiceScale), a),
                            hn::MulAdd(square, hn::Set(d, kCubic), hn::Set(d, 1.0F)));
    const V twice_slope =
        hn::MulAdd(square, hn::Set(d, 3.0F * kCubic * kTwiceScale), hn::Set(d, kTwiceScale));
    // d (a s(twice)) / da = s + a s (1 - s) twice', with 1 - s = s(-twice).
    const V s = simd::sigmoid(d, twice);
    const V complement = simd::sigmoid(d, hn::Neg(twice));
    const V slope = hn::MulAdd(hn::Mul(hn::Mul(a, s), complement), twice_slope, s);
    return hn::Mul(gradient, slope);
  });
}

void load_row(DType dtype, const void* from, std::int64_t offset, std::int64_t stride, std::int64_t n,
              float* to) {
  simd::load_tile(dtype, from, offset, 0, stride, 1, n, to, 0);
}

void store_row(const float* from, DType dtype, void* to, std::int64_t offset, std::int64_t stride,
               std::int64_t n) {
  simd::store_tile(from, 0, dtype, to, offset, 0, stride, 1, n);
}

}  // namespace krait::activation::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::activation {

HWY_EXPORT(gated_silu_row);
HWY_EXPORT(gelu_row);
HWY_EXPORT(gated_silu_backward_row);
HWY_EXPORT(gelu_backward_row);
HWY_EXPORT(load_row);
HWY_EXPORT(store_row);

void gated_silu_row(const float* x, const float* gate, float* out, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(gated_silu_row)(x, gate, out, n);
}

void gelu_row(const float* x, float* out, std::int64_t n, GeluKind kind) {
  HWY_DYNAMIC_DISPATCH(gelu_row)(x, out, n, kind);
}

void gated_silu_backward_row(const float* x, const float* gate, const float* dout, float* dx, float* dgate,
                             std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(gated_silu_backward_row)(x, gate, dout, dx, dgate, n);
}

void gelu_backward_row(const float* x, const float* dout, float* dx, std::int64_t n, GeluKind kind) {
  HWY_DYNAMIC_DISPATCH(gelu_backward_row)(x, dout, dx, n, kind);
}

void load_row(DType dtype, const void* from, std::int64_t offset, std::int64_t stride, std::int64_t n,
              float* to) {
  HWY_DYNAMIC_DISPATCH(load_row)(dtype, from, offset, stride, n, to);
}

void store_row(const float* from, DType dtype, void* to, std::int64_t offset, std::int64_t stride,
               std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(store_row)(from, dtype, to, offset, stride, n);
}

}  // namespace krait::activation
#endif
