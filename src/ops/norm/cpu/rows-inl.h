// Rows of channels in f32, and what is computed over them. Included once for each SIMD target.
#if defined(KRAIT_OPS_NORM_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_NORM_CPU_ROWS_INL_H_
#undef KRAIT_OPS_NORM_CPU_ROWS_INL_H_
#else
#define KRAIT_OPS_NORM_CPU_ROWS_INL_H_
#endif

#include <hwy/highway.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/simd/convert-inl.h"
#include "ops/norm/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::norm_kernels::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = krait::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// The row buffers are padded to whole vectors. What stands in the padding is computed along and never used.
template <typename T>
void widen(const T* from, std::int64_t stride, std::int64_t n, float* HWY_RESTRICT to) {
  const D d;
  std::int64_t i = 0;
  if (stride == 1) {
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    for (; i + lanes <= n; i += lanes) hn::Store(simd::load_f32(d, from + i), d, to + i);
  }
  for (; i < n; ++i) to[i] = static_cast<float>(from[i * stride]);
}

template <typename T>
void narrow(const float* HWY_RESTRICT from, std::int64_t n, std::int64_t stride, T* to) {
  const D d;
  std::int64_t i = 0;
  if (stride == 1) {
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    for (; i + lanes <= n; i += lanes) simd::store_f32(d, hn::Load(d, from + i), to + i);
  }
  for (; i < n; ++i) to[i * stride] = T(from[i]);
}

void read(const Rows& rows, std::int64_t row, std::int64_t n, float* HWY_RESTRICT to) {
  const void* from = rows.row(row);
  const std::int64_t stride = rows.channel_stride();
  switch (rows.dtype()) {
    case DType::bf16: return widen(static_cast<const bf16*>(from), stride, n, to);
    case DType::f16: return widen(static_cast<const f16*>(from), stride, n, to);
    default: return widen(static_cast<const float*>(from), stride, n, to);
  }
}

void write(const float* HWY_RESTRICT from, std::int64_t n, const Rows& rows, std::int64_t row) {
  void* to = rows.row(row);
  const std::int64_t stride = rows.channel_stride();
  switch (rows.dtype()) {
    case DType::bf16: return narrow(from, n, stride, static_cast<bf16*>(to));
    case DType::f16: return narrow(from, n, stride, static_cast<f16*>(to));
    default: return narrow(from, n, stride, static_cast<float*>(to));
  }
}

// a[i] = body(a[i], b[i]) over whole vectors of two row buffers, which may be one.
template <typename Body>
HWY_INLINE void combine(float* a, const float* b, std::int64_t n, const Body& body) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < n; i += lanes)
    hn::Store(body(hn::Load(d, a + i), hn::Load(d, b + i)), d, a + i);
}

// The sum of term(a[i], b[i]) in four vectors of partial sums.
template <typename Term>
HWY_INLINE float sum(const float* a, const float* b, std::int64_t n, const Term& term) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto at = [&](std::int64_t i) HWY_ATTR { return term(hn::LoadU(d, a + i), hn::LoadU(d, b + i)); };
  V s0 = hn::Zero(d);
  V s1 = s0;
  V s2 = s0;
  V s3 = s0;
  std::int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    s0 = hn::Add(s0, at(i));
    s1 = hn::Add(s1, at(i + lanes));
    s2 = hn::Add(s2, at(i + 2 * lanes));
    s3 = hn::Add(s3, at(i + 3 * lanes));
  }
  for (; i + lanes <= n; i += lanes) s0 = hn::Add(s0, at(i));
  if (i < n) {
    const auto rest = static_cast<std::size_t>(n - i);
    const V last = term(simd::load_f32_n(d, a + i, rest), simd::load_f32_n(d, b + i, rest));
    s1 = hn::Add(s1, hn::IfThenElseZero(hn::FirstN(d, rest), last));
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
}

struct Moments {
  float mean = 0.0F;
  float rstd = 0.0F;
};

HWY_INLINE Moments moments(NormKind kind, double eps, const float* HWY_RESTRICT r, std::int64_t n) {
  const D d;
  const auto count = static_cast<double>(n);
  Moments result;
  if (kind == NormKind::layer)
    result.mean =
        static_cast<float>(static_cast<double>(sum(r, r, n, [](V v, V) HWY_ATTR { return v; })) / count);
  // The sum of squared differences, not of squares: no cancellation where the mean is large.
  const V mean = hn::Set(d, result.mean);
  const float square = sum(r, r, n, [mean](V v, V) HWY_ATTR {
    const V difference = hn::Sub(v, mean);
    return hn::Mul(difference, difference);
  });
  result.rstd = static_cast<float>(1.0 / std::sqrt(static_cast<double>(square) / count + eps));
  return result;
}

// r = (r - mean) * rstd * weight + bias; weight and bias may be null.
HWY_INLINE void apply(Moments m, const float* weight, const float* bias, float* HWY_RESTRICT r,
                      std::int64_t n) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const V mean = hn::Set(d, m.mean);
  const V rstd = hn::Set(d, m.rstd);
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    V v = hn::Mul(hn::Sub(hn::LoadU(d, r + i), mean), rstd);
    if (weight != nullptr) v = hn::Mul(v, hn::LoadU(d, weight + i));
    if (bias != nullptr) v = hn::Add(v, hn::LoadU(d, bias + i));
    hn::StoreU(v, d, r + i);
  }
  for (; i < n; ++i) {
    const float scaled = (r[i] - m.mean) * m.rstd * (weight != nullptr ? weight[i] : 1.0F);
    r[i] = scaled + (bias != nullptr ? bias[i] : 0.0F);
  }
}

}  // namespace
}  // namespace krait::norm_kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_NORM_CPU_ROWS_INL_H_
