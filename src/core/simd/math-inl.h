// exp, exp2, log1p, softplus, sigmoid and silu of f32 vectors. Included once for each SIMD target, after
// hwy/highway.h. Errors are in units in the last place (ULP) of the exact result, on every target.
#if defined(KRAIT_CORE_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_CORE_SIMD_MATH_INL_H_
#undef KRAIT_CORE_SIMD_MATH_INL_H_
#else
#define KRAIT_CORE_SIMD_MATH_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <limits>

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

namespace math_detail {

// Adding 1.5 * 2^23 rounds to the nearest integer (ties to even) for |v| < 2^22, and leaves that integer
// in the low bits of the sum.
inline constexpr float kRound = 0x1.8p23F;

// 2^n for -126 <= n <= 127.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> power_of_two(
    D d, hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::RebindToSigned<D>> n) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  return hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(n, hn::Set(di, 127))));
}

// fraction * 2^n, rounded once where the result is subnormal; -252 <= n <= 254.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> scale(
    D d, hwy::HWY_NAMESPACE::Vec<D> fraction,
    hwy::HWY_NAMESPACE::Vec<hwy::HWY_NAMESPACE::RebindToSigned<D>> n) {
  namespace hn = hwy::HWY_NAMESPACE;
  const auto half = hn::ShiftRight<1>(n);
  return hn::Mul(hn::Mul(fraction, power_of_two(d, half)), power_of_two(d, hn::Sub(n, half)));
}

}  // namespace math_detail

// e^x within 1 ULP: subnormal results are rounded like any other, below them 0; infinity from
// x = 88.7229 on; NaN for NaN.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> exp(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  // e^-104 rounds to 0 and e^89 to infinity; the limits keep n in the range of `scale`.
  const auto clamped = hn::Max(hn::Set(d, -104.0F), hn::Min(hn::Set(d, 89.0F), x));
  const auto shifted = hn::MulAdd(clamped, hn::Set(d, 0x1.715476p0F), hn::Set(d, math_detail::kRound));
  const auto n = hn::Sub(shifted, hn::Set(d, math_detail::kRound));
  // x - n log(2) in two parts (Cody and Waite): n times the first one is exact.
  auto r = hn::NegMulAdd(n, hn::Set(d, 0x1.62e4p-1F), clamped);
  r = hn::NegMulAdd(n, hn::Set(d, 0x1.7f7d1cp-20F), r);
  // e^r = 1 + r + r^2 q(r) for |r| <= log(2) / 2; q minimises the largest relative error (3e-9).
  auto q = hn::Set(d, 0x1.6a2430p-10F);
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.1239e4p-7F));
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.5558f2p-5F));
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.555492p-3F));
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.fffffcp-2F));
  const auto fraction = hn::Add(hn::Set(d, 1.0F), hn::MulAdd(hn::Mul(r, r), q, r));
  const auto integer = hn::Sub(hn::BitCast(di, shifted), hn::BitCast(di, hn::Set(d, math_detail::kRound)));
  return hn::IfThenElse(hn::Ne(x, x), x, math_detail::scale(d, fraction, integer));
}

// 2^y for |y| <= 126 within 2 ULP (2.1 without fused multiply-add): the core of inner loops that fold the
// base into y and know its range. Outside of that range the result means nothing.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> exp2_bounded(D d, hwy::HWY_NAMESPACE::Vec<D> y) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  const auto shifted = hn::Add(y, hn::Set(d, math_detail::kRound));
  const auto r = hn::Sub(y, hn::Sub(shifted, hn::Set(d, math_detail::kRound)));
  // 2^r = 1 + r q(r) for |r| <= 1/2; q minimises the largest error in ULP (1.1).
  auto q = hn::Set(d, 0x1.5ab426p-10F);
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.3ceca2p-7F));
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.c6baa2p-5F));
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.ebf9b4p-3F));
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.62e424p-1F));
  const auto fraction = hn::MulAdd(q, r, hn::Set(d, 1.0F));
  // The integer part sits in the low bits of `shifted`; the others leave by the shift.
  return hn::BitCast(d, hn::Add(hn::BitCast(di, fraction), hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
}

// The same for any y: 0 where the result would be subnormal (y < -126), infinity from y = 128 on, NaN for
// NaN.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> exp2_flush(D d, hwy::HWY_NAMESPACE::Vec<D> y) {
  namespace hn = hwy::HWY_NAMESPACE;
  // At y = 128 the fraction is 1 exactly, and the exponent is that of infinity. Min would lose a NaN on
  // some targets.
  const auto top = hn::Set(d, 128.0F);
  const auto power = exp2_bounded(d, hn::IfThenElse(hn::Gt(y, top), top, y));
  return hn::IfThenZeroElse(hn::Lt(y, hn::Set(d, -126.0F)), power);
}

// The sine and cosine of x quarter turns (x pi / 2), each within 2^-23 for any x, by exact reduction.
template <class D>
HWY_INLINE void sincos_quarter_turns(D d, hwy::HWY_NAMESPACE::Vec<D> x, hwy::HWY_NAMESPACE::Vec<D>& sine,
                                     hwy::HWY_NAMESPACE::Vec<D>& cosine) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  const auto shifted = hn::Add(x, hn::Set(d, math_detail::kRound));
  const auto r = hn::Sub(x, hn::Sub(shifted, hn::Set(d, math_detail::kRound)));
  const auto quadrant = hn::BitCast(di, shifted);  // in its two low bits
  const auto square = hn::Mul(r, r);
  // Polynomials for |r| <= 1/2, smallest relative error.
  auto s = hn::Set(d, -0x1.2d9302p-8F);
  s = hn::MulAdd(s, square, hn::Set(d, 0x1.465e92p-4F));
  s = hn::MulAdd(s, square, hn::Set(d, -0x1.4abbbap-1F));
  s = hn::Mul(r, hn::MulAdd(s, square, hn::Set(d, 0x1.921fb6p+0F)));
  auto c = hn::Set(d, 0x1.d9d570p-11F);
  c = hn::MulAdd(c, square, hn::Set(d, -0x1.55c5e0p-6F));
  c = hn::MulAdd(c, square, hn::Set(d, 0x1.03c1dep-2F));
  c = hn::MulAdd(c, square, hn::Set(d, -0x1.3bd3ccp+0F));
  c = hn::MulAdd(c, square, hn::Set(d, 1.0F));
  // One quarter turn further, (sin, cos) becomes (cos, -sin).
  const auto odd = hn::RebindMask(d, hn::TestBit(quadrant, hn::Set(di, 1)));
  const auto sine_sign = hn::ShiftLeft<30>(hn::And(quadrant, hn::Set(di, 2)));
  const auto cosine_sign = hn::ShiftLeft<30>(hn::And(hn::Add(quadrant, hn::Set(di, 1)), hn::Set(di, 2)));
  sine = hn::Xor(hn::IfThenElse(odd, c, s), hn::BitCast(d, sine_sign));
  cosine = hn::Xor(hn::IfThenElse(odd, s, c), hn::BitCast(d, cosine_sign));
}

// log(1 + x) for 0 <= x < 2^126 within 2 ULP; infinity for infinity, NaN for NaN.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> log1p(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  const auto one = hn::Set(d, 1.0F);
  // 1 + x = 2^k m with m in [sqrt(1/2), sqrt(2)). Rounding 1 + x may choose the neighbouring k at a
  // border, which is harmless: the fraction below is computed from x, not from the rounded sum.
  const auto sum = hn::BitCast(di, hn::Add(one, x));
  const auto k = hn::ShiftRight<23>(hn::Sub(sum, hn::Set(di, 0x3f3504f3)));
  const auto down = math_detail::power_of_two(d, hn::Sub(hn::Zero(di), k));  // exact: 2^-k, k <= 126
  const auto f = hn::MulAdd(x, down, hn::Sub(down, one));                    // m - 1
  // log(1 + f) = f - f^2 / 2 + f^3 q(f); q minimises the largest relative error (6e-9).
  auto q = hn::Set(d, -0x1.38b3e8p-4F);
  q = hn::MulAdd(q, f, hn::Set(d, 0x1.055b18p-3F));
  q = hn::MulAdd(q, f, hn::Set(d, -0x1.0d8568p-3F));
  q = hn::MulAdd(q, f, hn::Set(d, 0x1.22da2ap-3F));
  q = hn::MulAdd(q, f, hn::Set(d, -0x1.547242p-3F));
  q = hn::MulAdd(q, f, hn::Set(d, 0x1.99a008p-3F));
  q = hn::MulAdd(q, f, hn::Set(d, -0x1.000228p-2F));
  q = hn::MulAdd(q, f, hn::Set(d, 0x1.555554p-2F));
  const auto square = hn::Mul(f, f);
  // Small terms first: k log(2) in two parts, the first one with few enough bits for an exact product.
  const auto kf = hn::ConvertTo(d, k);
  auto tail = hn::Mul(hn::Mul(square, f), q);
  tail = hn::MulAdd(kf, hn::Set(d, 0x1.7f7d1cp-20F), tail);
  tail = hn::NegMulAdd(hn::Set(d, 0.5F), square, tail);
  const auto result = hn::MulAdd(kf, hn::Set(d, 0x1.62e4p-1F), hn::Add(f, tail));
  // Also covers NaN: the comparison is false for it.
  return hn::IfThenElse(hn::Lt(x, hn::Set(d, std::numeric_limits<float>::infinity())), result, x);
}

// log(1 + e^x), and x itself for x > 20, within 3 ULP.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> softplus(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  namespace hn = hwy::HWY_NAMESPACE;
  return hn::IfThenElse(hn::Gt(x, hn::Set(d, 20.0F)), x, log1p(d, exp(d, x)));
}

// 1 / (1 + e^-x) within 3 ULP.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> sigmoid(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const auto one = hn::Set(d, 1.0F);
  const auto e = exp(d, hn::Neg(hn::Abs(x)));  // <= 1: no overflow on either side
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

// x / (1 + e^-x) within 4 ULP.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> silu(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  return hwy::HWY_NAMESPACE::Mul(x, sigmoid(d, x));
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_CORE_SIMD_MATH_INL_H_
