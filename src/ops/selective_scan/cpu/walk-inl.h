// The inner loops of the SIMD path: states of one vector of channels walk the steps of a tile. Included
// once for each SIMD target.
#if defined(KRAIT_OPS_SELECTIVE_SCAN_CPU_WALK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_SELECTIVE_SCAN_CPU_WALK_INL_H_
#undef KRAIT_OPS_SELECTIVE_SCAN_CPU_WALK_INL_H_
#else
#define KRAIT_OPS_SELECTIVE_SCAN_CPU_WALK_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "core/simd/math-inl.h"
#include "ops/selective_scan/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::scan::HWY_NAMESPACE {
// One vector of channels over the steps of a tile; steps and states are `width` floats apart.
struct Lane {
  std::int64_t steps;
  std::int64_t width;
  const float* HWY_RESTRICT dt;
  const float* HWY_RESTRICT du;  // dt u
  float* HWY_RESTRICT y;         // gains C h
};

// Advances kStates states (rows of `A`, which holds log2(e) A, and of `h`). kBounded: all exponents are
// known to lie within +-126.
template <int kStates, bool kBounded, bool kConstantB, bool kConstantC>
HWY_NOINLINE void walk_real(const Lane& lane, const float* HWY_RESTRICT A, float* HWY_RESTRICT h, Factor B,
                            Factor C) {
  const Tag d;
  const std::int64_t width = lane.width;
  V a[kStates];
  V state[kStates];
  for (int k = 0; k < kStates; ++k) {
    a[k] = hn::Load(d, A + k * width);
    state[k] = hn::Load(d, h + k * width);
  }
  const float* HWY_RESTRICT b = B.data;
  const float* HWY_RESTRICT c = C.data;
  const float* HWY_RESTRICT dt_at = lane.dt;
  const float* HWY_RESTRICT du_at = lane.du;
  float* HWY_RESTRICT y_at = lane.y;
  for (std::int64_t step = 0; step < lane.steps; ++step) {
    const V dt = hn::Load(d, dt_at);
    const V du = hn::Load(d, du_at);
    V y = hn::Load(d, y_at);
    V decay[kStates];
    for (int k = 0; k < kStates; ++k) decay[k] = hn::Mul(dt, a[k]);
    if constexpr (kBounded)
      simd::exp2_bounded(d, decay);
    else
      simd::exp2_flush(d, decay);
    for (int k = 0; k < kStates; ++k) {
      const V input = hn::Mul(du, factor_at<kConstantB>(b, k, width));
      state[k] = hn::MulAdd(decay[k], state[k], input);
      y = hn::MulAdd(state[k], factor_at<kConstantC>(c, k, width), y);
    }
    hn::Store(y, d, y_at);
    dt_at += width;
    du_at += width;
    y_at += width;
    b += B.step_stride;
    c += C.step_stride;
  }
  for (int k = 0; k < kStates; ++k) hn::Store(state[k], d, h + k * width);
}

// Advances one complex state; imaginary halves of A (in quarter turns) and h lie `half` behind the real
// ones.
template <bool kConstantB, bool kConstantC>
HWY_NOINLINE void walk_complex(const Lane& lane, const float* HWY_RESTRICT A, float* HWY_RESTRICT h,
                               std::int64_t half, Factor B, Factor C) {
  const Tag d;
  const V a_re = hn::Load(d, A);
  const V a_im = hn::Load(d, A + half);
  V h_re = hn::Load(d, h);
  V h_im = hn::Load(d, h + half);
  const float* b = B.data;
  const float* c = C.data;
  for (std::int64_t step = 0; step < lane.steps; ++step) {
    const std::int64_t at = step * lane.width;
    const V dt = hn::Load(d, lane.dt + at);
    const V du = hn::Load(d, lane.du + at);
    V sine;
    V cosine;
    simd::sincos_quarter_turns(d, hn::Mul(dt, a_im), sine, cosine);
    const V radius = simd::exp2_flush(d, hn::Mul(dt, a_re));
    const V decay_re = hn::Mul(radius, cosine);
    const V decay_im = hn::Mul(radius, sine);
    const V input_re = hn::Mul(du, factor_at<kConstantB>(b, 0, 0));
    const V input_im = hn::Mul(du, factor_at<kConstantB>(b + B.half, 0, 0));
    const V next_re = hn::NegMulAdd(decay_im, h_im, hn::MulAdd(decay_re, h_re, input_re));
    h_im = hn::MulAdd(decay_im, h_re, hn::MulAdd(decay_re, h_im, input_im));
    h_re = next_re;
    const V c_re = factor_at<kConstantC>(c, 0, 0);
    const V c_im = factor_at<kConstantC>(c + C.half, 0, 0);
    const V product = hn::NegMulAdd(c_im, h_im, hn::Mul(c_re, h_re));
    hn::Store(hn::MulAdd(hn::Set(d, 2.0F), product, hn::Load(d, lane.y + at)), d, lane.y + at);
    b += B.step_stride;
    c += C.step_stride;
  }
  hn::Store(h_re, d, h);
  hn::Store(h_im, d, h + half);
}

// Advances all states of one vector of channels. `bounded` as kBounded.
inline void walk_all(const Lane& lane, std::int64_t d_state, bool complex, bool bounded, const float* A,
                     float* h, Factor B, Factor C) {
  constexpr int kStates = 4;
  const std::int64_t b_state = B.step_stride == 0 ? lane.width : 1;
  const std::int64_t c_state = C.step_stride == 0 ? lane.width : 1;
  const auto factors = [&](std::int64_t n, const auto& f) {
    Factor b = B;
    Factor c = C;
    b.data += n * b_state;
    c.data += n * c_state;
    f(A + n * lane.width, h + n * lane.width, b, c);
  };
  with_bool(B.step_stride == 0, [&](auto constant_b) {
    with_bool(C.step_stride == 0, [&](auto constant_c) {
      constexpr bool kB = decltype(constant_b)::value;
      constexpr bool kC = decltype(constant_c)::value;
      if (complex) {
        for (std::int64_t n = 0; n < d_state; ++n)
          factors(n, [&](const float* a, float* state, Factor b, Factor c) {
            walk_complex<kB, kC>(lane, a, state, d_state * lane.width, b, c);
          });
        return;
      }
      with_bool(bounded, [&](auto is_bounded) {
        constexpr bool kBounded = decltype(is_bounded)::value;
        std::int64_t n = 0;
        for (; n + kStates <= d_state; n += kStates)
          factors(n, [&](const float* a, float* state, Factor b, Factor c) {
            walk_real<kStates, kBounded, kB, kC>(lane, a, state, b, c);
          });
        for (; n < d_state; ++n)
          factors(n, [&](const float* a, float* state, Factor b, Factor c) {
            walk_real<1, kBounded, kB, kC>(lane, a, state, b, c);
          });
      });
    });
  });
}

}  // namespace krait::scan::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_SELECTIVE_SCAN_CPU_WALK_INL_H_
