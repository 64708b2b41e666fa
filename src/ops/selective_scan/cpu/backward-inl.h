// The inner loops of the backward: states of one vector of channels walk a tile, first to remember its states
// (advance), then to recompute them step by step (record) and to unwind them (unwind). Included once for
// each SIMD target.
#if defined(KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_
#undef KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_
#else
#define KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "core/simd/math-inl.h"
#include "ops/selective_scan/cpu/lanes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::scan::HWY_NAMESPACE {

// One vector of channels over the steps of a tile: of each array a step is one vector.
struct Strip {
  std::int64_t steps;
  const float* HWY_RESTRICT dt;
  const float* HWY_RESTRICT x;   // dt u
  const float* HWY_RESTRICT dy;  // gradient of y
  float* HWY_RESTRICT y;         // gains C h
  float* HWY_RESTRICT dx;        // gains the gradient of x
  float* HWY_RESTRICT ddt;       // gains that of dt through the decays, times log2(e)
};

// What the steps of a tile leave for the way back, for the states walked together: (step, state, lane). A
// complex state counts as two, real and imaginary part.
struct Record {
  float* HWY_RESTRICT decay;    // exp(dt A)
  float* HWY_RESTRICT carried;  // decay h_before
};

template <int kStates, bool kBounded>
HWY_INLINE void decays(V dt, const V (&a)[kStates], V (&decay)[kStates]) {
  const Tag d;
  for (int k = 0; k < kStates; ++k) decay[k] = hn::Mul(dt, a[k]);
  if constexpr (kBounded)
    simd::exp2_bounded(d, decay);
  else
    simd::exp2_flush(d, decay);
}

// Walks the states (rows of `h`, `width` apart) over the strip. `A` holds log2(e) A. kBounded: all exponents
// are known to lie within +-126.
template <int kStates, bool kBounded, bool kConstantB>
HWY_NOINLINE void advance_real(const Strip& strip, const float* HWY_RESTRICT A, float* HWY_RESTRICT h,
                               std::int64_t width, Factor B) {
  const Tag d;
  V a[kStates];
  V state[kStates];
  for (int k = 0; k < kStates; ++k) {
    a[k] = hn::Load(d, A + k * width);
    state[k] = hn::Load(d, h + k * width);
  }
  const float* HWY_RESTRICT b = B.data;
  for (std::int64_t at = 0; at < strip.steps * lanes(); at += lanes()) {
    const V x = hn::Load(d, strip.x + at);
    V decay[kStates];
    decays<kStates, kBounded>(hn::Load(d, strip.dt + at), a, decay);
    for (int k = 0; k < kStates; ++k)
      state[k] = hn::MulAdd(decay[k], state[k], hn::Mul(x, factor_at<kConstantB>(b, k, width)));
    b += B.step_stride;
  }
  for (int k = 0; k < kStates; ++k) hn::Store(state[k], d, h + k * width);
}

// The same from the states `h`, which stay; keeps the record, completes y and adds dy h to dC: for a variable
// C (step, state, lane), to be summed over the lanes later; for a constant one a vector for each state.
template <int kStates, bool kBounded, bool kConstantB, bool kConstantC>
HWY_NOINLINE void record_real(const Strip& strip, const float* HWY_RESTRICT A, const float* HWY_RESTRICT h,
                              std::int64_t width, Factor B, Factor C, Record record, float* HWY_RESTRICT dC) {
  const Tag d;
  V a[kStates];
  V state[kStates];
  for (int k = 0; k < kStates; ++k) {
    a[k] = hn::Load(d, A + k * width);
    state[k] = hn::Load(d, h + k * width);
  }
  const float* HWY_RESTRICT b = B.data;
  const float* HWY_RESTRICT c = C.data;
  for (std::int64_t at = 0; at < strip.steps * lanes(); at += lanes()) {
    const V x = hn::Load(d, strip.x + at);
    const V dy = hn::Load(d, strip.dy + at);
    V y = hn::Load(d, strip.y + at);
    V decay[kStates];
    decays<kStates, kBounded>(hn::Load(d, strip.dt + at), a, decay);
    for (int k = 0; k < kStates; ++k) {
      const std::int64_t slot = at * kStates + k * lanes();
      const V carried = hn::Mul(decay[k], state[k]);
      hn::Store(decay[k], d, record.decay + slot);
      hn::Store(carried, d, record.carried + slot);
      state[k] = hn::MulAdd(x, factor_at<kConstantB>(b, k, width), carried);
      y = hn::MulAdd(state[k], factor_at<kConstantC>(c, k, width), y);
      float* const sum = dC + (kConstantC ? k * width : slot);
      hn::Store(hn::MulAdd(dy, state[k], hn::Load(d, sum)), d, sum);
    }
    hn::Store(y, d, strip.y + at);
    b += B.step_stride;
    c += C.step_stride;
  }
}

// From the last step to the first: takes the gradient `g` of the states after the strip to that of the states
// before it, completes dx and ddt, adds g x to dB (laid out as dC is) and completes dA.
template <int kStates, bool kConstantB, bool kConstantC>
HWY_NOINLINE void unwind_real(const Strip& strip, const float* HWY_RESTRICT A, float* HWY_RESTRICT g,
                              float* HWY_RESTRICT dA, std::int64_t width, Factor B, Factor C, Record record,
                              float* HWY_RESTRICT dB) {
  const Tag d;
  V carry[kStates];
  V sum_a[kStates];
  for (int k = 0; k < kStates; ++k) {
    carry[k] = hn::Load(d, g + k * width);
    sum_a[k] = hn::Load(d, dA + k * width);
  }
  const float* HWY_RESTRICT b = B.data + strip.steps * B.step_stride;
  const float* HWY_RESTRICT c = C.data + strip.steps * C.step_stride;
  for (std::int64_t at = (strip.steps - 1) * lanes(); at >= 0; at -= lanes()) {
    b -= B.step_stride;
    c -= C.step_stride;
    const V dt = hn::Load(d, strip.dt + at);
    const V x = hn::Load(d, strip.x + at);
    const V dy = hn::Load(d, strip.dy + at);
    V dx = hn::Load(d, strip.dx + at);
    V ddt = hn::Load(d, strip.ddt + at);
    for (int k = 0; k < kStates; ++k) {
      const std::int64_t slot = at * kStates + k * lanes();
      const V gradient = hn::MulAdd(dy, factor_at<kConstantC>(c, k, width), carry[k]);
      float* const sum = dB + (kConstantB ? k * width : slot);
      hn::Store(hn::MulAdd(gradient, x, hn::Load(d, sum)), d, sum);
      dx = hn::MulAdd(gradient, factor_at<kConstantB>(b, k, width), dx);
      const V exponent = hn::Mul(gradient, hn::Load(d, record.carried + slot));
      ddt = hn::MulAdd(exponent, hn::Load(d, A + k * width), ddt);
      sum_a[k] = hn::MulAdd(exponent, dt, sum_a[k]);
      carry[k] = hn::Mul(gradient, hn::Load(d, record.decay + slot));
    }
    hn::Store(dx, d, strip.dx + at);
    hn::Store(ddt, d, strip.ddt + at);
  }
  for (int k = 0; k < kStates; ++k) {
    hn::Store(carry[k], d, g + k * width);
    hn::Store(sum_a[k], d, dA + k * width);
  }
}

// The decay of a complex state.
HWY_INLINE void complex_decay(V dt, V a_re, V a_im, V& re, V& im) {
  const Tag d;
  V sine;
  V cosine;
  simd::sincos_quarter_turns(d, hn::Mul(dt, a_im), sine, cosine);
  const V radius = simd::exp2_flush(d, hn::Mul(dt, a_re));
  re = hn::Mul(radius, cosine);
  im = hn::Mul(radius, sine);
}

// One complex state; imaginary halves of A (in quarter turns), h, g, dA and constant factors and their
// gradients lie `half` behind the real ones.
template <bool kConstantB>
HWY_NOINLINE void advance_complex(const Strip& strip, const float* HWY_RESTRICT A, float* HWY_RESTRICT h,
                                  std::int64_t half, Factor B) {
  const Tag d;
  const V a_re = hn::Load(d, A);
  const V a_im = hn::Load(d, A + half);
  V h_re = hn::Load(d, h);
  V h_im = hn::Load(d, h + half);
  const float* b = B.data;
  for (std::int64_t at = 0; at < strip.steps * lanes(); at += lanes()) {
    const V x = hn::Load(d, strip.x + at);
    V decay_re;
    V decay_im;
    complex_decay(hn::Load(d, strip.dt + at), a_re, a_im, decay_re, decay_im);
    const V input_re = hn::Mul(x, factor_at<kConstantB>(b, 0, 0));
    const V input_im = hn::Mul(x, factor_at<kConstantB>(b + B.half, 0, 0));
    const V next_re = hn::NegMulAdd(decay_im, h_im, hn::MulAdd(decay_re, h_re, input_re));
    h_im = hn::MulAdd(decay_im, h_re, hn::MulAdd(decay_re, h_im, input_im));
    h_re = next_re;
    b += B.step_stride;
  }
  hn::Store(h_re, d, h);
  hn::Store(h_im, d, h + half);
}

template <bool kConstantB, bool kConstantC>
HWY_NOINLINE void record_complex(const Strip& strip, const float* HWY_RESTRICT A, const float* HWY_RESTRICT h,
                                 std::int64_t half, Factor B, Factor C, Record record,
                                 float* HWY_RESTRICT dC) {
  const Tag d;
  const V a_re = hn::Load(d, A);
  const V a_im = hn::Load(d, A + half);
  V h_re = hn::Load(d, h);
  V h_im = hn::Load(d, h + half);
  const float* b = B.data;
  const float* c = C.data;
  for (std::int64_t at = 0; at < strip.steps * lanes(); at += lanes()) {
    const V x = hn::Load(d, strip.x + at);
    const V dy = hn::Load(d, strip.dy + at);
    V decay_re;
    V decay_im;
    complex_decay(hn::Load(d, strip.dt + at), a_re, a_im, decay_re, decay_im);
    const V carried_re = hn::NegMulAdd(decay_im, h_im, hn::Mul(decay_re, h_re));
    const V carried_im = hn::MulAdd(decay_im, h_re, hn::Mul(decay_re, h_im));
    hn::Store(decay_re, d, record.decay + 2 * at);
    hn::Store(decay_im, d, record.decay + 2 * at + lanes());
    hn::Store(carried_re, d, record.carried + 2 * at);
    hn::Store(carried_im, d, record.carried + 2 * at + lanes());
    h_re = hn::MulAdd(x, factor_at<kConstantB>(b, 0, 0), carried_re);
    h_im = hn::MulAdd(x, factor_at<kConstantB>(b + B.half, 0, 0), carried_im);
    const V c_re = factor_at<kConstantC>(c, 0, 0);
    const V c_im = factor_at<kConstantC>(c + C.half, 0, 0);
    const V product = hn::NegMulAdd(c_im, h_im, hn::Mul(c_re, h_re));
    hn::Store(hn::MulAdd(hn::Set(d, 2.0F), product, hn::Load(d, strip.y + at)), d, strip.y + at);
    const V twice = hn::Add(dy, dy);
    float* const sum_re = dC + (kConstantC ? 0 : 2 * at);
    float* const sum_im = kConstantC ? dC + half : sum_re + lanes();
    hn::Store(hn::MulAdd(twice, h_re, hn::Load(d, sum_re)), d, sum_re);
    hn::Store(hn::NegMulAdd(twice, h_im, hn::Load(d, sum_im)), d, sum_im);
    b += B.step_stride;
    c += C.step_stride;
  }
}

template <bool kConstantB, bool kConstantC>
HWY_NOINLINE void unwind_complex(const Strip& strip, const float* HWY_RESTRICT A, float* HWY_RESTRICT g,
                                 float* HWY_RESTRICT dA, std::int64_t half, Factor B, Factor C, Record record,
                                 float* HWY_RESTRICT dB) {
  const Tag d;
  const V a_re = hn::Load(d, A);
  // From quarter turns to the unit of the real part, log2(e).
  const V a_im = hn::Mul(hn::Load(d, A + half), hn::Set(d, kLog2E / kQuarterTurns));
  V carry_re = hn::Load(d, g);
  V carry_im = hn::Load(d, g + half);
  V sum_a_re = hn::Load(d, dA);
  V sum_a_im = hn::Load(d, dA + half);
  const float* b = B.data + strip.steps * B.step_stride;
  const float* c = C.data + strip.steps * C.step_stride;
  for (std::int64_t at = (strip.steps - 1) * lanes(); at >= 0; at -= lanes()) {
    b -= B.step_stride;
    c -= C.step_stride;
    const V dt = hn::Load(d, strip.dt + at);
    const V x = hn::Load(d, strip.x + at);
    const V dy = hn::Load(d, strip.dy + at);
    const V twice = hn::Add(dy, dy);
    const V g_re = hn::MulAdd(twice, factor_at<kConstantC>(c, 0, 0), carry_re);
    const V g_im = hn::NegMulAdd(twice, factor_at<kConstantC>(c + C.half, 0, 0), carry_im);
    float* const sum_re = dB + (kConstantB ? 0 : 2 * at);
    float* const sum_im = kConstantB ? dB + half : sum_re + lanes();
    hn::Store(hn::MulAdd(g_re, x, hn::Load(d, sum_re)), d, sum_re);
    hn::Store(hn::MulAdd(g_im, x, hn::Load(d, sum_im)), d, sum_im);
    const V dx = hn::MulAdd(g_re, factor_at<kConstantB>(b, 0, 0), hn::Load(d, strip.dx + at));
    hn::Store(hn::MulAdd(g_im, factor_at<kConstantB>(b + B.half, 0, 0), dx), d, strip.dx + at);
    const V carried_re = hn::Load(d, record.carried + 2 * at);
    const V carried_im = hn::Load(d, record.carried + 2 * at + lanes());
    const V exponent_re = hn::MulAdd(g_re, carried_re, hn::Mul(g_im, carried_im));
    const V exponent_im = hn::NegMulAdd(g_re, carried_im, hn::Mul(g_im, carried_re));
    const V ddt = hn::MulAdd(exponent_re, a_re, hn::Load(d, strip.ddt + at));
    hn::Store(hn::MulAdd(exponent_im, a_im, ddt), d, strip.ddt + at);
    sum_a_re = hn::MulAdd(exponent_re, dt, sum_a_re);
    sum_a_im = hn::MulAdd(exponent_im, dt, sum_a_im);
    const V decay_re = hn::Load(d, record.decay + 2 * at);
    const V decay_im = hn::Load(d, record.decay + 2 * at + lanes());
    carry_re = hn::MulAdd(g_re, decay_re, hn::Mul(g_im, decay_im));
    carry_im = hn::NegMulAdd(g_re, decay_im, hn::Mul(g_im, decay_re));
  }
  hn::Store(carry_re, d, g);
  hn::Store(carry_im, d, g + half);
  hn::Store(sum_a_re, d, dA);
  hn::Store(sum_a_im, d, dA + half);
}

// totals[i] = the sum of the lanes of vector i of `values`.
inline void sum_lanes(const float* HWY_RESTRICT values, std::int64_t count, float* HWY_RESTRICT totals) {
  const Tag d;
  std::int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  // Four at a time: each folds to four lanes, and a transposition turns four sums across lanes into one
  // along.
  const hn::FixedTag<float, 4> d4;
  const auto fold = [&](const float* vector) HWY_ATTR {
    auto sum = hn::Load(d4, vector);
    for (std::int64_t lane = 4; lane < lanes(); lane += 4) sum = hn::Add(sum, hn::Load(d4, vector + lane));
    return sum;
  };
  for (; i + 4 <= count; i += 4) {
    hn::Vec<decltype(d4)> v[4] = {fold(values + i * lanes()), fold(values + (i + 1) * lanes()),
                                  fold(values + (i + 2) * lanes()), fold(values + (i + 3) * lanes())};
    simd::tile_detail::transpose_4x4(d4, v);
    hn::StoreU(hn::Add(hn::Add(v[0], v[1]), hn::Add(v[2], v[3])), d4, totals + i);
  }
#endif
  for (; i < count; ++i) totals[i] = hn::GetLane(hn::SumOfLanes(d, hn::Load(d, values + i * lanes())));
}

}  // namespace krait::scan::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_
