// The inner loops of the backward: states of one vector of channels walk a tile, first to leave the states
// before the next one (advance), then to recompute them step by step (record) and to unwind them (unwind).
// Included once for each SIMD target.
#if defined(KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_
#undef KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_
#else
#define KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "ops/selective_scan/cpu/lanes-inl.h"
#include "ops/selective_scan/cpu/strips-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::scan::HWY_NAMESPACE {

// What a step of a tile leaves for the way back, for the states walked together: one vector for each of them,
// part after part. A complex state counts as two.
enum Part : std::int64_t {
  kDecay,    // exp(dt A)
  kCarried,  // decay h_before
  kToB,      // gradient of B: gains g x of each vector of channels in turn, is summed over lanes at last
  kToC,
  kParts,
};

// The record of a tile. `before` is where the sums of the preceding channels stand: in the record itself, or
// for the first channels in zeros, over and over.
struct Record {
  float* steps;
  const float* before;
  std::int64_t before_step;
};

// Decays of states with the rates `a`. kBounded: all exponents are known to lie within +-126.
template <int kStates, bool kBounded>
HWY_INLINE void decays_of(V dt, const V (&a)[kStates], V (&decay)[kStates]) {
  const Tag d;
  for (int k = 0; k < kStates; ++k) decay[k] = hn::Mul(dt, a[k]);
  if constexpr (kBounded)
    simd::exp2_bounded(d, decay);
  else
    simd::exp2_flush(d, decay);
}

// Walks the states (rows of `h`, `width` apart) over a strip. `A` holds log2(e) A.
template <int kStates, bool kBounded, bool kConstantB>
HWY_NOINLINE void advance_real(const float* HWY_RESTRICT strip, std::int64_t steps,
                               const float* HWY_RESTRICT A, float* HWY_RESTRICT h, std::int64_t width,
                               Factor B) {
  const Tag d;
  V a[kStates];
  V state[kStates];
  for (int k = 0; k < kStates; ++k) {
    a[k] = hn::Load(d, A + k * width);
    state[k] = hn::Load(d, h + k * width);
  }
  const float* HWY_RESTRICT b = B.data;
  for (; steps > 0; --steps) {
    const V x = field(strip, kX);
    V decay[kStates];
    decays_of<kStates, kBounded>(field(strip, kDt), a, decay);
    for (int k = 0; k < kStates; ++k)
      state[k] = hn::MulAdd(decay[k], state[k], hn::Mul(x, factor_at<kConstantB>(b, k, width)));
    b += B.step_stride;
    strip += kFields * lanes();
  }
  for (int k = 0; k < kStates; ++k) hn::Store(state[k], d, h + k * width);
}

// The decays of a record, apart from the recurrence: these do not wait for one another.
template <int kStates, bool kBounded>
HWY_NOINLINE void record_decays(const float* HWY_RESTRICT strip, std::int64_t steps,
                                const float* HWY_RESTRICT A, std::int64_t width, float* HWY_RESTRICT record) {
  const Tag d;
  V a[kStates];
  for (int k = 0; k < kStates; ++k) a[k] = hn::Load(d, A + k * width);
  for (; steps > 0; --steps) {
    V decay[kStates];
    decays_of<kStates, kBounded>(field(strip, kDt), a, decay);
    for (int k = 0; k < kStates; ++k) hn::Store(decay[k], d, record + (kDecay * kStates + k) * lanes());
    strip += kFields * lanes();
    record += kParts * kStates * lanes();
  }
}

// Walks the strip once more from the states `h`, which stay, with the recorded decays: completes the record
// and y. The gradient dy h of C goes to the record or, where C is constant, to rows of `dC`.
template <int kStates, bool kConstantB, bool kConstantC>
HWY_NOINLINE void record_states(float* HWY_RESTRICT strip, std::int64_t steps, const float* HWY_RESTRICT h,
                                std::int64_t width, Factor B, Factor C, Record record,
                                float* HWY_RESTRICT dC) {
  const Tag d;
  V state[kStates];
  V sum_c[kStates];
  for (int k = 0; k < kStates; ++k) {
    state[k] = hn::Load(d, h + k * width);
    if constexpr (kConstantC) sum_c[k] = hn::Load(d, dC + k * width);
  }
  const float* HWY_RESTRICT b = B.data;
  const float* HWY_RESTRICT c = C.data;
  for (; steps > 0; --steps) {
    const V x = field(strip, kX);
    const V dy = field(strip, kDy);
    V y = field(strip, kY);
    for (int k = 0; k < kStates; ++k) {
      const V decay = hn::Load(d, record.steps + (kDecay * kStates + k) * lanes());
      const V carried = hn::Mul(decay, state[k]);
      hn::Store(carried, d, record.steps + (kCarried * kStates + k) * lanes());
      state[k] = hn::MulAdd(x, factor_at<kConstantB>(b, k, width), carried);
      y = hn::MulAdd(state[k], factor_at<kConstantC>(c, k, width), y);
      if constexpr (kConstantC) {
        sum_c[k] = hn::MulAdd(dy, state[k], sum_c[k]);
      } else {
        const std::int64_t at = (kToC * kStates + k) * lanes();
        hn::Store(hn::MulAdd(dy, state[k], hn::Load(d, record.before + at)), d, record.steps + at);
      }
    }
    set_field(strip, kY, y);
    b += B.step_stride;
    c += C.step_stride;
    strip += kFields * lanes();
    record.steps += kParts * kStates * lanes();
    record.before += record.before_step;
  }
  if constexpr (kConstantC)
    for (int k = 0; k < kStates; ++k) hn::Store(sum_c[k], d, dC + k * width);
}

// From the last step to the first: takes the gradient `g` of the states after the strip to that of the states
// before it, completes dx, ddt and dA. The gradient g x of B goes where that of C does.
template <int kStates, bool kConstantB, bool kConstantC>
HWY_NOINLINE void unwind_states(float* HWY_RESTRICT strip, std::int64_t steps, const float* HWY_RESTRICT A,
                                float* HWY_RESTRICT g, float* HWY_RESTRICT dA, std::int64_t width, Factor B,
                                Factor C, Record record, float* HWY_RESTRICT dB) {
  const Tag d;
  V carry[kStates];
  V sum_a[kStates];
  V sum_b[kStates];
  for (int k = 0; k < kStates; ++k) {
    carry[k] = hn::Load(d, g + k * width);
    sum_a[k] = hn::Load(d, dA + k * width);
    if constexpr (kConstantB) sum_b[k] = hn::Load(d, dB + k * width);
  }
  const float* HWY_RESTRICT b = B.data + steps * B.step_stride;
  const float* HWY_RESTRICT c = C.data + steps * C.step_stride;
  strip += steps * kFields * lanes();
  record.steps += steps * kParts * kStates * lanes();
  record.before += steps * record.before_step;
  for (; steps > 0; --steps) {
    b -= B.step_stride;
    c -= C.step_stride;
    strip -= kFields * lanes();
    record.steps -= kParts * kStates * lanes();
    record.before -= record.before_step;
    const V dt = field(strip, kDt);
    const V x = field(strip, kX);
    const V dy = field(strip, kDy);
    V dx = field(strip, kDx);
    V ddt = field(strip, kDdt);
    for (int k = 0; k < kStates; ++k) {
      const V gradient = hn::MulAdd(dy, factor_at<kConstantC>(c, k, width), carry[k]);
      if constexpr (kConstantB) {
        sum_b[k] = hn::MulAdd(gradient, x, sum_b[k]);
      } else {
        const std::int64_t at = (kToB * kStates + k) * lanes();
        hn::Store(hn::MulAdd(gradient, x, hn::Load(d, record.before + at)), d, record.steps + at);
      }
      dx = hn::MulAdd(gradient, factor_at<kConstantB>(b, k, width), dx);
      const V carried = hn::Load(d, record.steps + (kCarried * kStates + k) * lanes());
      const V exponent = hn::Mul(gradient, carried);
      ddt = hn::MulAdd(exponent, hn::Load(d, A + k * width), ddt);
      sum_a[k] = hn::MulAdd(exponent, dt, sum_a[k]);
      carry[k] = hn::Mul(gradient, hn::Load(d, record.steps + (kDecay * kStates + k) * lanes()));
    }
    set_field(strip, kDx, dx);
    set_field(strip, kDdt, ddt);
  }
  for (int k = 0; k < kStates; ++k) {
    hn::Store(carry[k], d, g + k * width);
    hn::Store(sum_a[k], d, dA + k * width);
    if constexpr (kConstantB) hn::Store(sum_b[k], d, dB + k * width);
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

// The same for one complex state; imaginary halves of A (in quarter turns), h, g, dA and of constant factors
// and their gradients lie `half` behind the real ones.
template <bool kConstantB>
HWY_NOINLINE void advance_complex(const float* HWY_RESTRICT strip, std::int64_t steps,
                                  const float* HWY_RESTRICT A, float* HWY_RESTRICT h, std::int64_t half,
                                  Factor B) {
  const Tag d;
  const V a_re = hn::Load(d, A);
  const V a_im = hn::Load(d, A + half);
  V h_re = hn::Load(d, h);
  V h_im = hn::Load(d, h + half);
  const float* b = B.data;
  for (; steps > 0; --steps) {
    const V x = field(strip, kX);
    V decay_re;
    V decay_im;
    complex_decay(field(strip, kDt), a_re, a_im, decay_re, decay_im);
    const V input_re = hn::Mul(x, factor_at<kConstantB>(b, 0, 0));
    const V input_im = hn::Mul(x, factor_at<kConstantB>(b + B.half, 0, 0));
    const V next_re = hn::NegMulAdd(decay_im, h_im, hn::MulAdd(decay_re, h_re, input_re));
    h_im = hn::MulAdd(decay_im, h_re, hn::MulAdd(decay_re, h_im, input_im));
    h_re = next_re;
    b += B.step_stride;
    strip += kFields * lanes();
  }
  hn::Store(h_re, d, h);
  hn::Store(h_im, d, h + half);
}

// Real and imaginary part of a number of the record.
struct ComplexPart {
  V re;
  V im;
};
HWY_INLINE ComplexPart load_part(const float* record, Part part) {
  const Tag d;
  return {hn::Load(d, record + 2 * part * lanes()), hn::Load(d, record + (2 * part + 1) * lanes())};
}
HWY_INLINE void store_part(float* record, Part part, V re, V im) {
  const Tag d;
  hn::Store(re, d, record + 2 * part * lanes());
  hn::Store(im, d, record + (2 * part + 1) * lanes());
}

template <bool kConstantB, bool kConstantC>
HWY_NOINLINE void record_complex(float* HWY_RESTRICT strip, std::int64_t steps, const float* HWY_RESTRICT A,
                                 const float* HWY_RESTRICT h, std::int64_t half, Factor B, Factor C,
                                 Record record, float* HWY_RESTRICT dC) {
  const Tag d;
  const V a_re = hn::Load(d, A);
  const V a_im = hn::Load(d, A + half);
  V h_re = hn::Load(d, h);
  V h_im = hn::Load(d, h + half);
  const float* b = B.data;
  const float* c = C.data;
  for (; steps > 0; --steps) {
    const V x = field(strip, kX);
    const V dy = field(strip, kDy);
    V decay_re;
    V decay_im;
    complex_decay(field(strip, kDt), a_re, a_im, decay_re, decay_im);
    const V carried_re = hn::NegMulAdd(decay_im, h_im, hn::Mul(decay_re, h_re));
    const V carried_im = hn::MulAdd(decay_im, h_re, hn::Mul(decay_re, h_im));
    store_part(record.steps, kDecay, decay_re, decay_im);
    store_part(record.steps, kCarried, carried_re, carried_im);
    h_re = hn::MulAdd(x, factor_at<kConstantB>(b, 0, 0), carried_re);
    h_im = hn::MulAdd(x, factor_at<kConstantB>(b + B.half, 0, 0), carried_im);
    const V c_re = factor_at<kConstantC>(c, 0, 0);
    const V c_im = factor_at<kConstantC>(c + C.half, 0, 0);
    const V product = hn::NegMulAdd(c_im, h_im, hn::Mul(c_re, h_re));
    set_field(strip, kY, hn::MulAdd(hn::Set(d, 2.0F), product, field(strip, kY)));
    const V twice = hn::Add(dy, dy);
    if constexpr (kConstantC) {
      hn::Store(hn::MulAdd(twice, h_re, hn::Load(d, dC)), d, dC);
      hn::Store(hn::NegMulAdd(twice, h_im, hn::Load(d, dC + half)), d, dC + half);
    } else {
      const ComplexPart sum = load_part(record.before, kToC);
      store_part(record.steps, kToC, hn::MulAdd(twice, h_re, sum.re), hn::NegMulAdd(twice, h_im, sum.im));
    }
    b += B.step_stride;
    c += C.step_stride;
    strip += kFields * lanes();
    record.steps += 2 * kParts * lanes();
    record.before += record.before_step;
  }
}

template <bool kConstantB, bool kConstantC>
HWY_NOINLINE void unwind_complex(float* HWY_RESTRICT strip, std::int64_t steps, const float* HWY_RESTRICT A,
                                 float* HWY_RESTRICT g, float* HWY_RESTRICT dA, std::int64_t half, Factor B,
                                 Factor C, Record record, float* HWY_RESTRICT dB) {
  const Tag d;
  const V a_re = hn::Load(d, A);
  // From quarter turns to the unit of the real part, log2(e).
  const V a_im = hn::Mul(hn::Load(d, A + half), hn::Set(d, kLog2E / kQuarterTurns));
  V carry_re = hn::Load(d, g);
  V carry_im = hn::Load(d, g + half);
  V sum_a_re = hn::Load(d, dA);
  V sum_a_im = hn::Load(d, dA + half);
  const float* b = B.data + steps * B.step_stride;
  const float* c = C.data + steps * C.step_stride;
  strip += steps * kFields * lanes();
  record.steps += steps * 2 * kParts * lanes();
  record.before += steps * record.before_step;
  for (; steps > 0; --steps) {
    b -= B.step_stride;
    c -= C.step_stride;
    strip -= kFields * lanes();
    record.steps -= 2 * kParts * lanes();
    record.before -= record.before_step;
    const V dt = field(strip, kDt);
    const V x = field(strip, kX);
    const V dy = field(strip, kDy);
    const V twice = hn::Add(dy, dy);
    const V g_re = hn::MulAdd(twice, factor_at<kConstantC>(c, 0, 0), carry_re);
    const V g_im = hn::NegMulAdd(twice, factor_at<kConstantC>(c + C.half, 0, 0), carry_im);
    if constexpr (kConstantB) {
      hn::Store(hn::MulAdd(g_re, x, hn::Load(d, dB)), d, dB);
      hn::Store(hn::MulAdd(g_im, x, hn::Load(d, dB + half)), d, dB + half);
    } else {
      const ComplexPart sum = load_part(record.before, kToB);
      store_part(record.steps, kToB, hn::MulAdd(g_re, x, sum.re), hn::MulAdd(g_im, x, sum.im));
    }
    const V dx = hn::MulAdd(g_re, factor_at<kConstantB>(b, 0, 0), field(strip, kDx));
    set_field(strip, kDx, hn::MulAdd(g_im, factor_at<kConstantB>(b + B.half, 0, 0), dx));
    const ComplexPart carried = load_part(record.steps, kCarried);
    const V exponent_re = hn::MulAdd(g_re, carried.re, hn::Mul(g_im, carried.im));
    const V exponent_im = hn::NegMulAdd(g_re, carried.im, hn::Mul(g_im, carried.re));
    const V ddt = hn::MulAdd(exponent_re, a_re, field(strip, kDdt));
    set_field(strip, kDdt, hn::MulAdd(exponent_im, a_im, ddt));
    sum_a_re = hn::MulAdd(exponent_re, dt, sum_a_re);
    sum_a_im = hn::MulAdd(exponent_im, dt, sum_a_im);
    const ComplexPart decay = load_part(record.steps, kDecay);
    carry_re = hn::MulAdd(g_re, decay.re, hn::Mul(g_im, decay.im));
    carry_im = hn::NegMulAdd(g_re, decay.im, hn::Mul(g_im, decay.re));
  }
  hn::Store(carry_re, d, g);
  hn::Store(carry_im, d, g + half);
  hn::Store(sum_a_re, d, dA);
  hn::Store(sum_a_im, d, dA + half);
}

// totals[k] = the sum of the lanes of vector k of `values`, k < count.
HWY_INLINE void sum_lanes(const float* values, std::int64_t count, float* totals) {
#if HWY_TARGET != HWY_SCALAR
  if (count == 4) {
    // Each folds to four lanes, and a transposition turns four sums across lanes into one along them.
    const hn::FixedTag<float, 4> d4;
    hn::Vec<decltype(d4)> v[4];
    for (int k = 0; k < 4; ++k) {
      v[k] = hn::Load(d4, values + k * lanes());
      for (std::int64_t lane = 4; lane < lanes(); lane += 4)
        v[k] = hn::Add(v[k], hn::Load(d4, values + k * lanes() + lane));
    }
    simd::tile_detail::transpose_4x4(d4, v);
    hn::StoreU(hn::Add(hn::Add(v[0], v[1]), hn::Add(v[2], v[3])), d4, totals);
    return;
  }
#endif
  const Tag d;
  for (std::int64_t k = 0; k < count; ++k)
    totals[k] = hn::GetLane(hn::SumOfLanes(d, hn::Load(d, values + k * lanes())));
}

}  // namespace krait::scan::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_SELECTIVE_SCAN_CPU_BACKWARD_INL_H_
