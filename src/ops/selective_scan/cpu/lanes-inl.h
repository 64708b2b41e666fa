// What the SIMD kernels share: vectors of channels, the factors B and C, and copies between tensors and
// scratch. Included once for each SIMD target.
#if defined(KRAIT_OPS_SELECTIVE_SCAN_CPU_LANES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_SELECTIVE_SCAN_CPU_LANES_INL_H_
#undef KRAIT_OPS_SELECTIVE_SCAN_CPU_LANES_INL_H_
#else
#define KRAIT_OPS_SELECTIVE_SCAN_CPU_LANES_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <type_traits>

#include "core/dispatch.h"
#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "krait/core/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace krait::scan::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace simd = krait::HWY_NAMESPACE;

using Tag = hn::CappedTag<float, 16>;
using V = hn::Vec<Tag>;

inline constexpr float kLog2E = 1.44269504F;
inline constexpr float kQuarterTurns = 0.636619772F;  // 2 / pi

HWY_INLINE std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(Tag())); }

// NaN counts as largest.
HWY_INLINE V larger(V a, V b) { return hn::IfThenElse(hn::Le(b, a), a, b); }

// B or C: constant ones have a vector of channels for each state (`width` apart), variable ones one number
// for each step (`step_stride` apart) and state (side by side).
struct Factor {
  const float* data = nullptr;
  std::int64_t step_stride = 0;  // 0: constant
  std::int64_t half = 0;         // from the real to the imaginary half
};

template <bool kConstant>
HWY_INLINE V factor_at(const float* data, std::int64_t state, std::int64_t width) {
  const Tag d;
  if constexpr (kConstant)
    return hn::Load(d, data + state * width);
  else
    return hn::Set(d, data[state]);
}

// to[r, c] = tensor[offset + r row_stride + c column_stride], in elements; complex ones in two halves.
inline void stage(const Tensor& tensor, std::int64_t offset, std::int64_t row_stride,
                  std::int64_t column_stride, std::int64_t rows, std::int64_t columns, float* to,
                  std::int64_t width, std::int64_t half) {
  if (tensor.dtype() == DType::c64) {
    for (std::int64_t part = 0; part < 2; ++part)
      simd::load_tile(DType::f32, tensor.raw(), 2 * offset + part, 2 * row_stride, 2 * column_stride, rows,
                      columns, to + part * half, width);
  } else {
    simd::load_tile(tensor.dtype(), tensor.raw(), offset, row_stride, column_stride, rows, columns, to,
                    width);
  }
}

inline void unstage(const float* from, std::int64_t width, std::int64_t half, const Tensor& tensor,
                    std::int64_t offset, std::int64_t row_stride, std::int64_t column_stride,
                    std::int64_t rows, std::int64_t columns) {
  if (tensor.dtype() == DType::c64) {
    for (std::int64_t part = 0; part < 2; ++part)
      simd::store_tile(from + part * half, width, DType::f32, tensor.raw(), 2 * offset + part, 2 * row_stride,
                       2 * column_stride, rows, columns);
  } else {
    simd::store_tile(from, width, tensor.dtype(), tensor.raw(), offset, row_stride, column_stride, rows,
                     columns);
  }
}

// Brings A (state, channel), with the imaginary half `half` behind, to log2(e) A and quarter turns; `largest`
// becomes that of |Re A| over the states.
inline void scale_decay_rates(std::int64_t channels, std::int64_t half, std::int64_t width, bool complex,
                              float* A, float* largest) {
  const Tag d;
  for (std::int64_t c = 0; c < channels; c += lanes()) {
    V most = hn::Zero(d);
    for (std::int64_t at = c; at < half; at += width) {
      const V real = hn::Mul(hn::Load(d, A + at), hn::Set(d, kLog2E));
      hn::Store(real, d, A + at);
      most = larger(most, hn::Abs(real));
      if (complex)
        hn::Store(hn::Mul(hn::Load(d, A + half + at), hn::Set(d, kQuarterTurns)), d, A + half + at);
    }
    hn::Store(most, d, largest + c);
  }
}

// Calls f(TypeTag<T>) for the type of f32, bf16 and f16 tensors.
template <typename F>
HWY_INLINE void with_type(DType dtype, const F& f) {
  if (dtype == DType::bf16)
    f(TypeTag<bf16>{});
  else if (dtype == DType::f16)
    f(TypeTag<f16>{});
  else
    f(TypeTag<float>{});
}

// Calls f(true or false as a type) for a value known at run time.
template <typename F>
HWY_INLINE void with_bool(bool value, const F& f) {
  if (value)
    f(std::true_type{});
  else
    f(std::false_type{});
}

}  // namespace krait::scan::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_SELECTIVE_SCAN_CPU_LANES_INL_H_
