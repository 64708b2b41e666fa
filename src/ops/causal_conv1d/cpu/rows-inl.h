// The convolution of rows of channels. Included once for each SIMD target.
#if defined(KRAIT_OPS_CAUSAL_CONV1D_CPU_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_CAUSAL_CONV1D_CPU_ROWS_INL_H_
#undef KRAIT_OPS_CAUSAL_CONV1D_CPU_ROWS_INL_H_
#else
#define KRAIT_OPS_CAUSAL_CONV1D_CPU_ROWS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/simd/convert-inl.h"
#include "core/simd/math-inl.h"
#include "krait/ops/causal_conv1d.h"

HWY_BEFORE_NAMESPACE();
namespace krait::conv_detail::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using krait::HWY_NAMESPACE::load_f32;
using krait::HWY_NAMESPACE::load_f32_n;
using krait::HWY_NAMESPACE::store_f32;
using krait::HWY_NAMESPACE::store_f32_n;

// Weights (K rows, `stride` apart) and bias of a range of channels, readable one vector beyond its end.
struct TapRows {
  const float* weight = nullptr;
  std::int64_t stride = 0;
  const float* bias = nullptr;
  std::int64_t kernel = 0;
  Activation activation = Activation::none;
};

// Calls body(type tag) for the storage type of `dtype`, one of f32, bf16, f16.
template <typename Body>
void with_storage(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    default: return body(float{});
  }
}

template <class D>
HWY_INLINE hn::Vec<D> finish(D d, hn::Vec<D> sum, Activation activation) {
  return activation == Activation::silu ? krait::HWY_NAMESPACE::silu(d, sum) : sum;
}

// kRows consecutive outputs of one vector of channels. Every input is loaded once; each output is summed
// from the bias on, the oldest tap first, as everywhere else.
template <int kRows, int kKernel, bool kPart, typename T>
HWY_INLINE void row_block(const T* HWY_RESTRICT x, std::int64_t x_stride, const TapRows& taps,
                          std::int64_t channel, T* HWY_RESTRICT out, std::int64_t out_stride,
                          std::size_t lanes) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  const auto load = [&](std::int64_t row) HWY_ATTR {
    const T* from = x + row * x_stride + channel;
    if constexpr (kPart) return load_f32_n(d, from, lanes);
    return load_f32(d, from);
  };
  V sum[kRows];
  for (int i = 0; i < kRows; ++i) sum[i] = hn::LoadU(d, taps.bias + channel);
  if constexpr (kKernel > 0) {
    V value[kRows + kKernel - 1];
    for (int row = 0; row < kRows + kKernel - 1; ++row) value[row] = load(row);
    for (int k = 0; k < kKernel; ++k) {
      const V weight = hn::LoadU(d, taps.weight + k * taps.stride + channel);
      for (int i = 0; i < kRows; ++i) sum[i] = hn::MulAdd(weight, value[k + i], sum[i]);
    }
  } else {
    for (std::int64_t k = 0; k < taps.kernel; ++k) {
      const V weight = hn::LoadU(d, taps.weight + k * taps.stride + channel);
      for (int i = 0; i < kRows; ++i) sum[i] = hn::MulAdd(weight, load(k + i), sum[i]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    const V value = finish(d, sum[i], taps.activation);
    T* to = out + i * out_stride + channel;
    if constexpr (kPart)
      store_f32_n(d, value, to, lanes);
    else
      store_f32(d, value, to);
  }
}

template <int kKernel, typename T>
void convolve_rows(const T* x, std::int64_t x_stride, const TapRows& taps, T* out, std::int64_t out_stride,
                   std::int64_t rows, std::int64_t channels) {
  constexpr int kRows = 4;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(hn::ScalableTag<float>()));
  const std::int64_t whole = channels / lanes * lanes;
  const auto rest = static_cast<std::size_t>(channels - whole);
  std::int64_t t = 0;
  for (; t + kRows <= rows; t += kRows, x += kRows * x_stride, out += kRows * out_stride) {
    for (std::int64_t c = 0; c < whole; c += lanes)
      row_block<kRows, kKernel, false>(x, x_stride, taps, c, out, out_stride, 0);
    if (rest > 0) row_block<kRows, kKernel, true>(x, x_stride, taps, whole, out, out_stride, rest);
  }
  for (; t < rows; ++t, x += x_stride, out += out_stride) {
    for (std::int64_t c = 0; c < whole; c += lanes)
      row_block<1, kKernel, false>(x, x_stride, taps, c, out, out_stride, 0);
    if (rest > 0) row_block<1, kKernel, true>(x, x_stride, taps, whole, out, out_stride, rest);
  }
}

// out row t = act(bias + sum_k weight_k x row (t + k)); channels are contiguous in both.
template <typename T>
void convolve(const T* x, std::int64_t x_stride, const TapRows& taps, T* out, std::int64_t out_stride,
              std::int64_t rows, std::int64_t channels) {
  switch (taps.kernel) {
    case 2: return convolve_rows<2>(x, x_stride, taps, out, out_stride, rows, channels);
    case 3: return convolve_rows<3>(x, x_stride, taps, out, out_stride, rows, channels);
    case 4: return convolve_rows<4>(x, x_stride, taps, out, out_stride, rows, channels);
    default: return convolve_rows<0>(x, x_stride, taps, out, out_stride, rows, channels);
  }
}

}  // namespace krait::conv_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_CAUSAL_CONV1D_CPU_ROWS_INL_H_
