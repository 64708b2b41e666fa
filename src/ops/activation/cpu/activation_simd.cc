#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/activation/cpu/activation_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "core/simd/math-inl.h"
#include "ops/activation/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::activation::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
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

// erf for x >= 0 with an absolute error below 2e-7 (Abramowitz and Stegun, 7.1.26).
HWY_INLINE V erf_positive(D d, V x) {
  const V t = hn::Div(hn::Set(d, 1.0F), hn::MulAdd(x, hn::Set(d, 0.3275911F), hn::Set(d, 1.0F)));
  V p = hn::Set(d, 1.061405429F);
  p = hn::MulAdd(p, t, hn::Set(d, -1.453152027F));
  p = hn::MulAdd(p, t, hn::Set(d, 1.421413741F));
  p = hn::MulAdd(p, t, hn::Set(d, -0.284496736F));
  p = hn::MulAdd(p, t, hn::Set(d, 0.254829592F));
  const V gauss = krait::HWY_NAMESPACE::exp(d, hn::Neg(hn::Mul(x, x)));
  return hn::NegMulAdd(hn::Mul(p, t), gauss, hn::Set(d, 1.0F));
}

void gated_silu_row(const float* x, const float* gate, float* out, std::int64_t n) {
  const D d;
  for_each_vector(x, gate, out, n, [d](V a, V g) { return hn::Mul(a, krait::HWY_NAMESPACE::silu(d, g)); });
}

void gelu_row(const float* x, float* out, std::int64_t n, GeluKind kind) {
  const D d;
  if (kind == GeluKind::exact) {
    for_each_vector(x, x, out, n, [d](V a, V) {
      const V erf = erf_positive(d, hn::Abs(hn::Mul(a, hn::Set(d, 0.70710678F))));
      return hn::Mul(hn::Mul(a, hn::Set(d, 0.5F)), hn::Add(hn::Set(d, 1.0F), hn::CopySign(erf, a)));
    });
    return;
  }
  // 0.5 (1 + tanh(y)) = sigmoid(2 y).
  for_each_vector(x, x, out, n, [d](V a, V) {
    const V cube = hn::Mul(hn::Mul(a, a), hn::Mul(a, hn::Set(d, 0.044715F)));
    const V twice = hn::Mul(hn::Set(d, 1.5957691F), hn::Add(a, cube));
    return hn::Mul(a, krait::HWY_NAMESPACE::sigmoid(d, twice));
  });
}

}  // namespace krait::activation::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::activation {

HWY_EXPORT(gated_silu_row);
HWY_EXPORT(gelu_row);

void gated_silu_row(const float* x, const float* gate, float* out, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(gated_silu_row)(x, gate, out, n);
}

void gelu_row(const float* x, float* out, std::int64_t n, GeluKind kind) {
  HWY_DYNAMIC_DISPATCH(gelu_row)(x, out, n, kind);
}

}  // namespace krait::activation
#endif
