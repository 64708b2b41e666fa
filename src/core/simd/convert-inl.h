// Loads and stores of f32, bf16 and f16 elements as f32 vectors. Included once for each SIMD target,
// after hwy/highway.h. No function touches memory beyond the elements that it is asked for.
#if defined(KRAIT_CORE_SIMD_CONVERT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_CORE_SIMD_CONVERT_INL_H_
#undef KRAIT_CORE_SIMD_CONVERT_INL_H_
#else
#define KRAIT_CORE_SIMD_CONVERT_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "krait/core/dtype.h"

// Highway converts f16 with one instruction here; elsewhere its conversion truncates and does not
// know infinities, so that we use our own.
#undef KRAIT_SIMD_NATIVE_F16
#if HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
#define KRAIT_SIMD_NATIVE_F16 0
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2 && !defined(HWY_DISABLE_F16C)
#define KRAIT_SIMD_NATIVE_F16 1
#elif HWY_ARCH_ARM_A64
#define KRAIT_SIMD_NATIVE_F16 1
#else
#define KRAIT_SIMD_NATIVE_F16 0
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> load_f32(D d, const float* HWY_RESTRICT p) {
  return hwy::HWY_NAMESPACE::LoadU(d, p);
}

// `p` points to Lanes(d) elements.
template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> load_f32(D d, const bf16* HWY_RESTRICT p) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::Rebind<std::uint16_t, D> d16;
  const hn::RebindToUnsigned<D> d32;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, &p->bits))));
}

template <class D>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> load_f32(D d, const f16* HWY_RESTRICT p) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::Rebind<std::uint16_t, D> d16;
#if KRAIT_SIMD_NATIVE_F16
  const hn::Rebind<hwy::float16_t, D> dh;
  return hn::PromoteTo(d, hn::BitCast(dh, hn::LoadU(d16, &p->bits)));
#else
  const hn::RebindToUnsigned<D> d32;
  const hn::RebindToSigned<D> di32;
  const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, &p->bits));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(d32, 0x8000U)));
  const auto magnitude = hn::ShiftLeft<13>(hn::And(bits, hn::Set(d32, 0x7fffU)));
  // 2^112 moves the exponent's bias from 15 to 127, exactly, subnormals included.
  const auto scaled = hn::BitCast(d32, hn::Mul(hn::BitCast(d, magnitude), hn::Set(d, 0x1p112F)));
  const auto special = hn::Gt(hn::BitCast(di32, magnitude), hn::Set(di32, 0x0f7fffff));
  const auto infinite = hn::Or(magnitude, hn::Set(d32, 0x7f800000U));
  const auto widened = hn::IfThenElse(hn::RebindMask(d32, special), infinite, scaled);
  return hn::BitCast(d, hn::Or(widened, sign));
#endif
}

// The first `n` < Lanes(d) elements; the other lanes are 0.
template <class D, typename T>
HWY_INLINE hwy::HWY_NAMESPACE::Vec<D> load_f32_n(D d, const T* HWY_RESTRICT p, std::size_t n) {
  T part[hwy::HWY_NAMESPACE::MaxLanes(d)] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load_f32(d, part);
}

template <class D>
HWY_INLINE void store_f32(D d, hwy::HWY_NAMESPACE::Vec<D> v, float* HWY_RESTRICT p) {
  hwy::HWY_NAMESPACE::StoreU(v, d, p);
}

// Rounds to nearest even, like the conversions of core/dtype.h.
template <class D>
HWY_INLINE void store_f32(D, hwy::HWY_NAMESPACE::Vec<D> v, bf16* HWY_RESTRICT p) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::Rebind<std::uint16_t, D> d16;
  const hn::RebindToUnsigned<D> d32;
  const hn::RebindToSigned<D> di32;
  const auto bits = hn::BitCast(d32, v);
  const auto high = hn::ShiftRight<16>(bits);
  const auto odd = hn::And(high, hn::Set(d32, 1U));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fffU))));
  const auto quiet = hn::Or(high, hn::Set(d32, 0x40U));
  const auto nan = hn::RebindMask(d32, hn::Ne(v, v));
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di32, hn::IfThenElse(nan, quiet, rounded))), d16, &p->bits);
}

template <class D>
HWY_INLINE void store_f32([[maybe_unused]] D d, hwy::HWY_NAMESPACE::Vec<D> v, f16* HWY_RESTRICT p) {
  namespace hn = hwy::HWY_NAMESPACE;
#if KRAIT_SIMD_NATIVE_F16
  const hn::Rebind<hwy::float16_t, D> dh;
  const hn::Rebind<std::uint16_t, D> d16;
  hn::StoreU(hn::BitCast(d16, hn::DemoteTo(dh, v)), d16, &p->bits);
#else
  float lanes[hn::MaxLanes(d)];
  hn::StoreU(v, d, lanes);
  for (std::size_t i = 0; i < hn::Lanes(d); ++i) p[i] = f16(lanes[i]);
#endif
}

// The first `n` < Lanes(d) lanes.
template <class D, typename T>
HWY_INLINE void store_f32_n(D d, hwy::HWY_NAMESPACE::Vec<D> v, T* HWY_RESTRICT p, std::size_t n) {
  T part[hwy::HWY_NAMESPACE::MaxLanes(d)];
  store_f32(d, v, part);
  std::memcpy(p, part, n * sizeof(T));
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_CORE_SIMD_CONVERT_INL_H_
