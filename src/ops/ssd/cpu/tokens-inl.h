// What the SIMD paths of ssd share: tiles of tokens in f32, step sizes, and the end of an output. Included
// once for each SIMD target.
#if defined(KRAIT_OPS_SSD_CPU_TOKENS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_SSD_CPU_TOKENS_INL_H_
#undef KRAIT_OPS_SSD_CPU_TOKENS_INL_H_
#else
#define KRAIT_OPS_SSD_CPU_TOKENS_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "ops/ssd/problem.h"

HWY_BEFORE_NAMESPACE();
namespace krait::ssd_detail::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A chunk: tokens [begin, begin + tokens) of a run.
struct Chunk {
  const TokenRun* run = nullptr;
  std::int64_t begin = 0;
  std::int64_t tokens = 0;
};

// Calls body(first, position, step, count) for stretches of equally spaced positions, first counted from
// the chunk's begin.
template <typename Body>
void for_each_stretch(const Problem& p, const Chunk& chunk, const Body& body) {
  const TokenRun& run = *chunk.run;
  if (run.listed < 0) {
    body(std::int64_t{0}, run.start + chunk.begin * run.step, run.step, chunk.tokens);
  } else {
    for (std::int64_t i = 0; i < chunk.tokens; ++i)
      body(i, p.runs->position(run, chunk.begin + i), std::int64_t{1}, std::int64_t{1});
  }
}

// Row i of `to` = t[row, token i, index, :] of t (B, L, H or G, width).
inline void load_tokens(const Problem& p, const Chunk& chunk, const Tensor& t, std::int64_t index, float* to,
                        std::int64_t to_stride) {
  for_each_stretch(
      p, chunk, [&](std::int64_t first, std::int64_t position, std::int64_t step, std::int64_t count) {
        krait::HWY_NAMESPACE::load_tile(
            t.dtype(), t.raw(), chunk.run->row * t.stride(0) + position * t.stride(1) + index * t.stride(2),
            step * t.stride(1), t.stride(3), count, t.size(3), to + first * to_stride, to_stride);
      });
}

inline void store_tokens(const Problem& p, const Chunk& chunk, const float* from, std::int64_t from_stride,
                         const Tensor& t, std::int64_t index) {
  for_each_stretch(p, chunk,
                   [&](std::int64_t first, std::int64_t position, std::int64_t step, std::int64_t count) {
                     krait::HWY_NAMESPACE::store_tile(
                         from + first * from_stride, from_stride, t.dtype(), t.raw(),
                         chunk.run->row * t.stride(0) + position * t.stride(1) + index * t.stride(2),
                         step * t.stride(1), t.stride(3), count, t.size(3));
                   });
}

// dt + dt_bias of each token (dt itself where `discrete`). Readable and writable up to a whole vector beyond
// chunk.tokens, where it is 0 + dt_bias.
inline void load_raw_steps(const Problem& p, const Chunk& chunk, std::int64_t head, float* HWY_RESTRICT raw) {
  const hn::ScalableTag<float> df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for_each_stretch(p, chunk,
                   [&](std::int64_t first, std::int64_t position, std::int64_t step, std::int64_t count) {
                     krait::HWY_NAMESPACE::load_tile(
                         p.dt.dtype(), p.dt.raw(),
                         chunk.run->row * p.dt.stride(0) + position * p.dt.stride(1) + head * p.dt.stride(2),
                         step * p.dt.stride(1), 1, count, 1, raw + first, 1);
                   });
  const std::int64_t whole = (chunk.tokens + lanes - 1) / lanes * lanes;
  for (std::int64_t i = chunk.tokens; i < whole; ++i) raw[i] = 0.0F;
  if (!p.dt_bias) return;
  const auto bias = hn::Set(df, p.dt_bias.data<float>()[head]);
  for (std::int64_t i = 0; i < whole; i += lanes)
    hn::StoreU(hn::Add(hn::LoadU(df, raw + i), bias), df, raw + i);
}

// d = what x is multiplied with at each token; exponent = that of the decay, natural. `raw` comes from
// load_raw_steps and may be `exponent`.
inline void discretize_steps(const Problem& p, std::int64_t tokens, std::int64_t head, const float* raw,
                             float* d, float* exponent) {
  const hn::ScalableTag<float> df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto rate = hn::Set(df, p.A.data<float>()[head]);
  const auto low = hn::Set(df, p.dt_limit.low);
  const auto high = hn::Set(df, p.dt_limit.high);
  for (std::int64_t i = 0; i < tokens; i += lanes) {
    auto v = hn::LoadU(df, raw + i);
    if (p.dt_softplus) v = krait::HWY_NAMESPACE::softplus(df, v);
    // Comparisons instead of Min and Max, which would lose a NaN.
    v = hn::IfThenElse(hn::Lt(v, low), low, v);
    v = hn::IfThenElse(hn::Gt(v, high), high, v);
    hn::StoreU(v, df, d + i);
    hn::StoreU(hn::Mul(v, rate), df, exponent + i);
  }
}

// Both in one. Both results are readable and writable up to a whole vector beyond chunk.tokens.
inline void load_steps(const Problem& p, const Chunk& chunk, std::int64_t head, float* HWY_RESTRICT d,
                       float* HWY_RESTRICT exponent) {
  load_raw_steps(p, chunk, head, exponent);
  if (p.discrete) {
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(hn::ScalableTag<float>()));
    std::fill_n(d, (chunk.tokens + lanes - 1) / lanes * lanes, 1.0F);
  } else {
    discretize_steps(p, chunk.tokens, head, exponent, d, exponent);
  }
}

// The exponents a_i of the decay from the chunk's start up to and including token i, in base 2. They are
// summed in f64 and kept as two floats: a difference of large neighbours keeps its digits.
inline void sum_exponents(std::int64_t tokens, const float* exponent, float* high, float* low) {
  constexpr double kLog2E = 1.4426950408889634;
  // Factors beyond 2^-1000 and 2^1000 are 0 and infinity in f32; the limit keeps the sums finite.
  constexpr double kLimit = 1000.0;
  double sum = 0.0;
  for (std::int64_t i = 0; i < tokens; ++i) {
    double a = kLog2E * static_cast<double>(exponent[i]);
    if (a < -kLimit) a = -kLimit;
    if (a > kLimit) a = kLimit;
    sum += a;
    high[i] = static_cast<float>(sum);
    low[i] = static_cast<float>(sum - static_cast<double>(high[i]));
  }
}

// 2^(a_i - a_j) of tokens i and whole vectors j: `high_i`, `low_i` belong to token i.
template <class V>
HWY_INLINE V decay_between(V high_i, V low_i, const float* HWY_RESTRICT high_j,
                           const float* HWY_RESTRICT low_j) {
  const hn::ScalableTag<float> df;
  const auto difference =
      hn::Add(hn::Sub(high_i, hn::LoadU(df, high_j)), hn::Sub(low_i, hn::LoadU(df, low_j)));
  return krait::HWY_NAMESPACE::exp2_flush(df, difference);
}

// to_end_j = exp(a_last - a_j): what is left of token j at the chunk's end. Returns exp(a_last).
inline float decays_to_end(std::int64_t tokens, const float* HWY_RESTRICT high, const float* HWY_RESTRICT low,
                           float* HWY_RESTRICT to_end) {
  const hn::ScalableTag<float> df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const auto last_high = hn::Set(df, high[tokens - 1]);
  const auto last_low = hn::Set(df, low[tokens - 1]);
  for (std::int64_t j = 0; j < tokens; j += lanes)
    hn::StoreU(decay_between(last_high, last_low, high + j, low + j), df, to_end + j);
  return hn::GetLane(krait::HWY_NAMESPACE::exp2_flush(df, hn::Add(last_high, last_low)));
}

// from_start_i = exp(a_i): what is left at token i of the state before the chunk.
inline void decays_from_start(std::int64_t tokens, const float* HWY_RESTRICT high,
                              const float* HWY_RESTRICT low, float* HWY_RESTRICT from_start) {
  const hn::ScalableTag<float> df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t i = 0; i < tokens; i += lanes) {
    const auto sum = hn::Add(hn::LoadU(df, high + i), hn::LoadU(df, low + i));
    hn::StoreU(krait::HWY_NAMESPACE::exp2_flush(df, sum), df, from_start + i);
  }
}

// y (tokens, P) += D x, then *= silu(z), then goes to out. x holds the chunk's inputs like y; `spare` is a
// tile of that size. The strides of all three are whole vectors.
inline void finish_tokens(const Problem& p, const Chunk& chunk, std::int64_t head, float* HWY_RESTRICT y,
                          const float* HWY_RESTRICT x, float* HWY_RESTRICT spare, std::int64_t stride) {
  const hn::ScalableTag<float> df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  if (p.D) {
    // One row readable to a whole vector.
    std::copy_n(p.D.data<float>() + head * p.headdim(), p.headdim(), spare);
    for (std::int64_t t = 0; t < chunk.tokens; ++t) {
      for (std::int64_t q = 0; q < stride; q += lanes) {
        const auto skip = hn::Mul(hn::LoadU(df, spare + q), hn::LoadU(df, x + t * stride + q));
        hn::StoreU(hn::Add(hn::LoadU(df, y + t * stride + q), skip), df, y + t * stride + q);
      }
    }
  }
  if (p.z) {
    load_tokens(p, chunk, p.z, head, spare, stride);
    for (std::int64_t i = 0; i < chunk.tokens * stride; i += lanes) {
      const auto gate = krait::HWY_NAMESPACE::silu(df, hn::LoadU(df, spare + i));
      hn::StoreU(hn::Mul(hn::LoadU(df, y + i), gate), df, y + i);
    }
  }
  store_tokens(p, chunk, y, stride, p.out, head);
}

}  // namespace krait::ssd_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_SSD_CPU_TOKENS_INL_H_
