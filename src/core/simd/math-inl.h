// exp, exp2, sine and cosine, softplus, sigmoid, silu and its derivative of f32 vectors. Included once for
// each SIMD target, after hwy/highway.h. Errors are in units in the last place (ULP) of the exact result, on
// every target.
#if defined(KRAIT_CORE_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_CORE_SIMD_MATH_INL_H_
#undef KRAIT_CORE_SIMD_MATH_INL_H_
#else
#define KRAIT_CORE_SIMD_MATH_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

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

// Replaces each y by 2^y for |y| <= 126 within 2 ULP (2.1 without fused multiply-add): the core of inner
// loops that fold the base into y and know its range. Outside of that range the result means nothing.
// Several vectors advance side by side, since each one alone is a long chain of dependent operations.
template <class D, int kCount>
HWY_INLINE void exp2_bounded(D d, hwy::HWY_NAMESPACE::Vec<D> (&y)[kCount]) {
  namespace hn = hwy::HWY_NAMESPACE;
  using V = hn::Vec<D>;
  const hn::RebindToSigned<D> di;
  const auto round = hn::Set(d, math_detail::kRound);
  V shifted[kCount];
  V r[kCount];
  V q[kCount];
  for (int i = 0; i < kCount; ++i) shifted[i] = hn::Add(y[i], round);
  for (int i = 0; i < kCount; ++i) r[i] = hn::Sub(y[i], hn::Sub(shifted[i], round));
  // 2^r = 1 + r q(r) for |r| <= 1/2; q minimises the largest error in ULP (1.1).
  const auto next = [&](float term) HWY_ATTR {
    for (int i = 0; i < kCount; ++i) q[i] = hn::MulAdd(q[i], r[i], hn::Set(d, term));
  };
  for (int i = 0; i < kCount; ++i) q[i] = hn::Set(d, 0x1.5ab426p-10F);
  next(0x1.3ceca2p-7F);
  next(0x1.c6baa2p-5F);
  next(0x1.ebf9b4p-3F);
  next(0x1.62e424p-1F);
  next(1.0F);
  // The integer part sits in the low bits of `shifted`; the others leave by the shift.
  for (int i = 0; i < kCount; ++i) {
    const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, shifted[i]));
    y[i] = hn::BitCast(d, hn::Add(hn::BitCast(di, q[i]), exponent));
  }
}

// The same for any y: 0 where the result would be subnormal (y < -126), infinity from y = 128 on, NaN for
// NaN.
template <class D, int kCount>
HWY_INLINE void exp2_flush(D d, hwy::HWY_NAMESPACE::Vec<D> (&y)[kCount]) {
  namespace hn = hwy::HWY_NAMESPACE;
  // At y = 128 the fraction is 1 exactly, and the exponent is that of infinity. Min would lose a NaN on
  // some targets.
  const auto top = hn::Set(d, 128.0F);
  hn::Vec<D> power[kCount];
  for (int i = 0; i < kCount; ++i) power[i] = hn::IfThenElse(hn::Gt(y[i], top), top, y[i]);
  exp2_bounded(d, power);
  for (int i = 0; i < kCount; ++i) y[i] = hn::IfThenZeroElse(hn::Lt(y[i], hn::Set(d, -126.0F)), power[i]);
}

template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> exp2_flush(D d, hwy::HWY_NAMESPACE::Vec<D> y) {
  hwy::HWY_NAMESPACE::Vec<D> one[1] = {y};
  exp2_flush(d, one);
  return one[0];
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

namespace math_detail {

// e^-|x| within 2 ULP: what softplus and sigmoid need, shorter than `exp`. 0 where it would be subnormal
// (|x| > 87.3365), NaN for NaN.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> exp_of_minus_abs(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  const auto minus = hn::Or(x, hn::SignBit(d));
  const auto shifted = hn::MulAdd(minus, hn::Set(d, 0x1.715476p0F), hn::Set(d, kRound));
  const auto n = hn::Sub(shifted, hn::Set(d, kRound));
  auto r = hn::NegMulAdd(n, hn::Set(d, 0x1.62e4p-1F), minus);
  r = hn::NegMulAdd(n, hn::Set(d, 0x1.7f7d1cp-20F), r);
  // e^r = 1 + r q(r) for |r| <= log(2) / 2; q minimises the largest error in ULP (1.1).
  auto q = hn::Set(d, 0x1.0edb8ep-7F);
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.573cb4p-5F));
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.555ce6p-3F));
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.fffdbep-2F));
  q = hn::MulAdd(q, r, hn::Set(d, 0x1.ffffeep-1F));
  const auto fraction = hn::MulAdd(q, r, hn::Set(d, 1.0F));
  const auto bits = hn::ShiftLeft<23>(hn::Add(hn::BitCast(di, shifted), hn::Set(di, 127)));
  const auto power = hn::Mul(fraction, hn::BitCast(d, bits));
  return hn::IfThenZeroElse(hn::Lt(minus, hn::Set(d, -87.3365F)), power);
}

}  // namespace math_detail

// log(1 + e^x), and x itself for x > 20, within 3.5 ULP; 0 for x < -87.3365.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> softplus(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  namespace hn = hwy::HWY_NAMESPACE;
  // max(x, 0) + log(1 + e), e = e^-|x| in [0, 1], where log(1 + e) = e (1 + e q(e)); q minimises the
  // largest relative error (5e-9).
  const auto e = math_detail::exp_of_minus_abs(d, x);
  auto q = hn::Set(d, -0x1.b2ea6ep-9F);
  q = hn::MulAdd(q, e, hn::Set(d, 0x1.4b01f6p-6F));
  q = hn::MulAdd(q, e, hn::Set(d, -0x1.d85d48p-5F));
  q = hn::MulAdd(q, e, hn::Set(d, 0x1.b576ccp-4F));
  q = hn::MulAdd(q, e, hn::Set(d, -0x1.3a79a2p-3F));
  q = hn::MulAdd(q, e, hn::Set(d, 0x1.935c52p-3F));
  q = hn::MulAdd(q, e, hn::Set(d, -0x1.ff26d2p-3F));
  q = hn::MulAdd(q, e, hn::Set(d, 0x1.554deep-2F));
  q = hn::MulAdd(q, e, hn::Set(d, -0x1.ffffd2p-2F));
  q = hn::MulAdd(q, e, hn::Set(d, 1.0F));
  const auto sum = hn::MulAdd(q, e, hn::Max(x, hn::Zero(d)));
  return hn::IfThenElse(hn::Le(x, hn::Set(d, 20.0F)), sum, x);  // x for NaN too
}

// 1 / (1 + e^-x) within 4 ULP; 0 for x < -87.3365.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> sigmoid(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const auto one = hn::Set(d, 1.0F);
  const auto e = math_detail::exp_of_minus_abs(d, x);
  return hn::Div(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), e, one), hn::Add(one, e));
}

// x / (1 + e^-x) within 5 ULP; -0 for x < -87.3365.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> silu(D d, hwy::HWY_NAMESPACE::Vec<D> x) {
  return hwy::HWY_NAMESPACE::Mul(x, sigmoid(d, x));
}

// silu(x), and its derivative s (1 + x (1 - s)) with s = sigmoid(x), for the price of one exponential and one
// division. `value` within 6 ULP, `derivative` within 2^-21 and, below -87.3365, 0; NaN for infinities.
template <class D>
HWY_INLINE void silu_with_derivative(D d, hwy::HWY_NAMESPACE::Vec<D> x, hwy::HWY_NAMESPACE::Vec<D>& value,
                                     hwy::HWY_NAMESPACE::Vec<D>& derivative) {
  namespace hn = hwy::HWY_NAMESPACE;
  const auto one = hn::Set(d, 1.0F);
  const auto e = math_detail::exp_of_minus_abs(d, x);
  const auto large = hn::Div(one, hn::Add(one, e));  // sigmoid(|x|)
  const auto small = hn::Mul(e, large);              // 1 - sigmoid(|x|), without cancellation
  const auto negative = hn::Lt(x, hn::Zero(d));
  const auto s = hn::IfThenElse(negative, small, large);
  value = hn::Mul(x, s);
  derivative = hn::Mul(s, hn::MulAdd(x, hn::IfThenElse(negative, large, small), one));
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_CORE_SIMD_MATH_INL_H_
