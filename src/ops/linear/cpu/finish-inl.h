// What follows the sums of a product: bias, accumulation, and rounding to the dtype of the destination.
#if defined(KRAIT_OPS_LINEAR_CPU_FINISH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_LINEAR_CPU_FINISH_INL_H_
#undef KRAIT_OPS_LINEAR_CPU_FINISH_INL_H_
#else
#define KRAIT_OPS_LINEAR_CPU_FINISH_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "core/simd/convert-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::HWY_NAMESPACE {

// out[j] = sums[j] + bias[j] (+ out[j] where `accumulate`) for j < n; `bias` may be null.
template <typename T>
void finish_row(const float* HWY_RESTRICT sums, std::int64_t n, const float* HWY_RESTRICT bias,
                T* HWY_RESTRICT out, std::int64_t stride, bool accumulate) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t j = 0;
  if (stride == 1) {
    for (; j + lanes <= n; j += lanes) {
      auto value = hn::LoadU(d, sums + j);
      if (bias != nullptr) value = hn::Add(value, hn::LoadU(d, bias + j));
      if (accumulate) value = hn::Add(value, load_f32(d, out + j));
      store_f32(d, value, out + j);
    }
  }
  for (; j < n; ++j) {
    float value = sums[j];
    if (bias != nullptr) value += bias[j];
    if (accumulate) value += static_cast<float>(out[j * stride]);
    out[j * stride] = T(value);
  }
}

}  // namespace krait::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_LINEAR_CPU_FINISH_INL_H_
