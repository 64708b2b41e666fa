// Strips of the backward: one vector of channels over the steps of a tile. Copies between tensors and strips,
// and what is computed step by step without the states. Included once for each SIMD target.
#if defined(KRAIT_OPS_SELECTIVE_SCAN_CPU_STRIPS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_SELECTIVE_SCAN_CPU_STRIPS_INL_H_
#undef KRAIT_OPS_SELECTIVE_SCAN_CPU_STRIPS_INL_H_
#else
#define KRAIT_OPS_SELECTIVE_SCAN_CPU_STRIPS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "core/simd/convert-inl.h"
#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "krait/core/tensor.h"
#include "ops/selective_scan/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::scan::HWY_NAMESPACE {

// The fields of a step of a strip, one vector each, side by side: so that the inner loops need one pointer,
// and find a step in a few cache lines.
enum Field : std::int64_t {
  kDt,
  kX,      // dt u
  kDy,     // gradient of y
  kY,      // D u + sum C h
  kDx,     // gradient of x
  kDdt,    // that of dt through the decays, times log2(e)
  kU,      // (from here on not used by the inner loops)
  kSlope,  // d dt / d delta
  kGate,   // d out / d z, divided by y, times the gradient of out
  kFields,
};

HWY_INLINE V field(const float* step, Field which) { return hn::Load(Tag(), step + which * lanes()); }
HWY_INLINE void set_field(float* step, Field which, V value) {
  hn::Store(value, Tag(), step + which * lanes());
}

// Copies rows of a tensor (one for each step) into a field of strips and back: the vectors of a row go to
// strips `strip` floats apart, which is kinder to memory than taking strip by strip.
template <typename T>
void load_strips(const T* from, std::int64_t row_stride, std::int64_t column_stride, std::int64_t rows,
                 std::int64_t columns, float* to, std::int64_t strip) {
  if (column_stride != 1) {
    for (std::int64_t c = 0; c < columns; c += lanes(), to += strip)
      simd::load_tile(from + c * column_stride, row_stride, column_stride, rows,
                      std::min(lanes(), columns - c), to, kFields * lanes());
    return;
  }
  const Tag d;
  for (std::int64_t r = 0; r < rows; ++r, from += row_stride, to += kFields * lanes()) {
    float* vector = to;
    std::int64_t c = 0;
    for (; c + lanes() <= columns; c += lanes(), vector += strip)
      hn::Store(simd::load_f32(d, from + c), d, vector);
    for (std::int64_t i = 0; c + i < columns; ++i) vector[i] = static_cast<float>(from[c + i]);
  }
}

template <typename T>
void store_strips(const float* from, std::int64_t strip, T* to, std::int64_t row_stride,
                  std::int64_t column_stride, std::int64_t rows, std::int64_t columns) {
  if (column_stride != 1) {
    for (std::int64_t c = 0; c < columns; c += lanes(), from += strip)
      simd::store_tile(from, kFields * lanes(), to + c * column_stride, row_stride, column_stride, rows,
                       std::min(lanes(), columns - c));
    return;
  }
  const Tag d;
  for (std::int64_t r = 0; r < rows; ++r, to += row_stride, from += kFields * lanes()) {
    const float* vector = from;
    std::int64_t c = 0;
    for (; c + lanes() <= columns; c += lanes(), vector += strip)
      simd::store_f32(d, hn::Load(d, vector), to + c);
    for (std::int64_t i = 0; c + i < columns; ++i) to[c + i] = T(vector[i]);
  }
}

// A block of channels of a tensor (B, D, L) along the walk steps of one row: its first element, and how to go
// on.
struct Steps {
  DType dtype = DType::f32;
  void* data = nullptr;  // null: an absent tensor
  std::int64_t offset = 0;
  std::int64_t step_stride = 0;
  std::int64_t channel_stride = 0;
  std::int64_t channels = 0;

  // Steps [begin, end) of the row to and from strips `strip` floats apart.
  void load(std::int64_t begin, std::int64_t end, float* to, std::int64_t strip) const {
    with_type(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      load_strips(static_cast<const T*>(data) + offset + begin * step_stride, step_stride, channel_stride,
                  end - begin, channels, to, strip);
    });
  }
  void store(const float* from, std::int64_t strip, std::int64_t begin, std::int64_t end) const {
    if (data == nullptr) return;
    with_type(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      store_strips(from, strip, static_cast<T*>(data) + offset + begin * step_stride, step_stride,
                   channel_stride, end - begin, channels);
    });
  }
  // Asks for share `index` of `count` of steps [begin, end). Where channels are far apart a line of memory
  // holds many steps, and the first share asks for all.
  void prefetch(std::int64_t begin, std::int64_t end, std::int64_t index, std::int64_t count) const {
    if (data == nullptr) return;
    if (channel_stride != 1) {
      if (index > 0) return;
      count = 1;
    }
    const std::int64_t first = begin + (end - begin) * index / count;
    const std::int64_t last = begin + (end - begin) * (index + 1) / count;
    simd::prefetch_tile(data, offset + first * step_stride, step_stride, channel_stride, last - first,
                        channels, static_cast<std::int64_t>(size_of(dtype)));
  }
};

// kDt holds delta and becomes dt = softplus?(delta + bias); kSlope, where wanted, its derivative.
inline void complete_dt(float* HWY_RESTRICT strip, std::int64_t steps, bool softplus, V bias,
                        bool want_slope) {
  const Tag d;
  for (std::int64_t i = 0; i < steps; ++i, strip += kFields * lanes()) {
    const V delta = hn::Add(field(strip, kDt), bias);
    if (!softplus) {
      set_field(strip, kDt, delta);
      set_field(strip, kSlope, hn::Set(d, 1.0F));
    } else if (!want_slope) {
      set_field(strip, kDt, simd::softplus(d, delta));
    } else {
      set_field(strip, kDt, simd::softplus(d, delta));
      set_field(strip, kSlope, simd::sigmoid(d, delta));  // 1 above 20, where softplus is the identity
    }
  }
}

// out = y silu(z): kDy holds the gradient of out and becomes that of y; kGate holds z.
inline void complete_gate(float* HWY_RESTRICT strip, std::int64_t steps) {
  const Tag d;
  for (std::int64_t i = 0; i < steps; ++i, strip += kFields * lanes()) {
    V silu;
    V slope;
    simd::silu_with_derivative(d, field(strip, kGate), silu, slope);
    const V dout = field(strip, kDy);
    set_field(strip, kDy, hn::Mul(dout, silu));
    set_field(strip, kGate, hn::Mul(dout, slope));
  }
}

// What the sums over states start from.
inline void start_sums(float* HWY_RESTRICT strip, std::int64_t steps, V skip) {
  const Tag d;
  for (std::int64_t i = 0; i < steps; ++i, strip += kFields * lanes()) {
    const V u = field(strip, kU);
    set_field(strip, kX, hn::Mul(field(strip, kDt), u));
    set_field(strip, kY, hn::Mul(skip, u));
    set_field(strip, kDx, hn::Zero(d));
    set_field(strip, kDdt, hn::Zero(d));
  }
}

// Turns kDx, kDdt and kY into du, ddelta and dz, and adds to the gradients of D and delta_bias.
inline void complete_gradients(float* HWY_RESTRICT strip, std::int64_t steps, V skip, float* HWY_RESTRICT dD,
                               float* HWY_RESTRICT ddelta_bias) {
  const Tag d;
  const V log_2 = hn::Set(d, 1.0F / kLog2E);
  V sum_skip = hn::Load(d, dD);
  V sum_bias = hn::Load(d, ddelta_bias);
  for (std::int64_t i = 0; i < steps; ++i, strip += kFields * lanes()) {
    const V u = field(strip, kU);
    const V dy = field(strip, kDy);
    const V dx = field(strip, kDx);
    set_field(strip, kDx, hn::MulAdd(field(strip, kDt), dx, hn::Mul(skip, dy)));
    const V ddt = hn::MulAdd(u, dx, hn::Mul(log_2, field(strip, kDdt)));
    const V ddelta = hn::Mul(ddt, field(strip, kSlope));
    set_field(strip, kDdt, ddelta);
    set_field(strip, kY, hn::Mul(field(strip, kGate), field(strip, kY)));
    sum_skip = hn::MulAdd(dy, u, sum_skip);
    sum_bias = hn::Add(sum_bias, ddelta);
  }
  hn::Store(sum_skip, d, dD);
  hn::Store(sum_bias, d, ddelta_bias);
}

}  // namespace krait::scan::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_SELECTIVE_SCAN_CPU_STRIPS_INL_H_
