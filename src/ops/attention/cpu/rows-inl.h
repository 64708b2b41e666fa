// Rows of a head of keys (kernels.h) to and from dense f32. Included once for each SIMD target.
#if defined(KRAIT_OPS_ATTENTION_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_ATTENTION_CPU_ROWS_INL_H_
#undef KRAIT_OPS_ATTENTION_CPU_ROWS_INL_H_
#else
#define KRAIT_OPS_ATTENTION_CPU_ROWS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "core/simd/tile-inl.h"
#include "ops/attention/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::attention_kernels::HWY_NAMESPACE {

HWY_INLINE void multiply(float* x, std::int64_t n, float factor) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::Set(d, factor)), d, x + i);
  for (; i < n; ++i) x[i] *= factor;
}

inline void load_rows(const Problem& p, const Operand& from, std::int64_t width, std::int64_t head_kv,
                      std::int64_t begin, std::int64_t rows, float* to) {
  for (std::int64_t r = 0; r < rows; ++r)
    krait::HWY_NAMESPACE::load_tile(from.dtype, from.data, p.row_offset(from, head_kv, begin + r), 0,
                                    from.channel_stride, 1, width, to + r * width, 0);
}

inline void store_rows(const Problem& p, const float* from, std::int64_t width, const Operand& to,
                       std::int64_t head_kv, std::int64_t begin, std::int64_t rows) {
  for (std::int64_t r = 0; r < rows; ++r)
    krait::HWY_NAMESPACE::store_tile(from + r * width, 0, to.dtype, to.data,
                                     p.row_offset(to, head_kv, begin + r), 0, to.channel_stride, 1, width);
}

}  // namespace krait::attention_kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_ATTENTION_CPU_ROWS_INL_H_
