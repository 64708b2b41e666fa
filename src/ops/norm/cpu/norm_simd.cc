// A row is read once into f32 in the first-level cache, reduced, scaled there and written once. Memory sees
// each element of each operand once.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/norm/cpu/norm_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cmath>

#include "core/simd/convert-inl.h"
#include "core/simd/math-inl.h"
#include "ops/norm/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::norm_kernels::HWY_NAMESPACE {

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

// The sum of term(r[i]) in four vectors of partial sums.
template <typename Term>
HWY_INLINE float sum(const float* HWY_RESTRICT r, std::int64_t n, const Term& term) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  V s0 = hn::Zero(d);
  V s1 = s0;
  V s2 = s0;
  V s3 = s0;
  std::int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    s0 = hn::Add(s0, term(hn::LoadU(d, r + i)));
    s1 = hn::Add(s1, term(hn::LoadU(d, r + i + lanes)));
    s2 = hn::Add(s2, term(hn::LoadU(d, r + i + 2 * lanes)));
    s3 = hn::Add(s3, term(hn::LoadU(d, r + i + 3 * lanes)));
  }
  for (; i + lanes <= n; i += lanes) s0 = hn::Add(s0, term(hn::LoadU(d, r + i)));
  if (i < n) {
    const auto rest = static_cast<std::size_t>(n - i);
    const V last = term(simd::load_f32_n(d, r + i, rest));
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
    result.mean = static_cast<float>(static_cast<double>(sum(r, n, [](V v) { return v; })) / count);
  // The sum of squared differences, not of squares: no cancellation where the mean is large.
  const V mean = hn::Set(d, result.mean);
  const float square = sum(r, n, [mean](V v) {
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

void rows(const Problem& p, std::int64_t begin, std::int64_t end, float* workspace) {
  const D d;
  const std::int64_t n = p.channels;
  float* r = workspace;
  float* other = workspace + workspace_floats(n) / 2;  // the residual, then silu(z)
  const auto* weight = p.weight ? static_cast<const float*>(p.weight.row(0)) : nullptr;
  const auto* bias = p.bias ? static_cast<const float*>(p.bias.row(0)) : nullptr;
  const auto multiply = [](V a, V b) { return hn::Mul(a, b); };
  for (std::int64_t row = begin; row < end; ++row) {
    read(p.x, row, n, r);
    if (p.residual) {
      read(p.residual, row, n, other);
      combine(r, other, n, [](V a, V b) { return hn::Add(a, b); });
    }
    if (p.z) {
      read(p.z, row, n, other);
      combine(other, other, n, [d](V z, V) { return simd::silu(d, z); });
    }
    if (p.residual_out) write(r, n, p.residual_out, row);
    if (p.z && !p.norm_before_gate) combine(r, other, n, multiply);
    for (std::int64_t at = 0; at < n; at += p.group_size)
      apply(moments(p.kind, p.eps, r + at, p.group_size), weight == nullptr ? nullptr : weight + at,
            bias == nullptr ? nullptr : bias + at, r + at, p.group_size);
    if (p.z && p.norm_before_gate) combine(r, other, n, multiply);
    write(r, n, p.out, row);
  }
}

}  // namespace krait::norm_kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::norm_kernels {

HWY_EXPORT(rows);

void simd(const Problem& problem, std::int64_t begin, std::int64_t end, float* workspace) {
  HWY_DYNAMIC_DISPATCH(rows)(problem, begin, end, workspace);
}

// Two rows, each padded to whole vectors of any target (at most 256 bytes).
std::int64_t workspace_floats(std::int64_t channels) {
  constexpr std::int64_t kPadding = 64;
  return (channels + kPadding - 1) / kPadding * kPadding * 2;
}

}  // namespace krait::norm_kernels
#endif
