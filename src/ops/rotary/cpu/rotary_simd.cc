// The sines and cosines of a token are computed once, vectors at a time, and serve all of its heads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/rotary/cpu/rotary_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cstddef>
#include <numbers>

#include "core/simd/convert-inl.h"
#include "core/simd/math-inl.h"
#include "ops/rotary/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::rotary_kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = krait::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

struct Buffers {
  float* sine;  // (pairs), padded to whole vectors, as are the others
  float* cosine;
  float* first;  // a head whose pairs do not lie side by side
  float* second;
};

// The angle leaves f64 as quarter turns in [-2, 2]: the reduction loses nothing, whatever the position.
void angles(const Problem& p, double position, const Buffers& b) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  constexpr double kRound = 0x1.8p52;  // adding and subtracting it rounds to an integer
  const double quarters = position * (2.0 * std::numbers::inv_pi);
  for (std::int64_t i = 0; i < p.pairs(); ++i) {
    const double x = quarters * p.frequencies[static_cast<std::size_t>(i)];
    const double whole_turns = (x * 0.25 + kRound) - kRound;
    b.sine[i] = static_cast<float>(x - 4.0 * whole_turns);
  }
  for (std::int64_t i = 0; i < p.pairs(); i += lanes) {
    V sine;
    V cosine;
    simd::sincos_quarter_turns(d, hn::Load(d, b.sine + i), sine, cosine);
    hn::Store(sine, d, b.sine + i);
    hn::Store(cosine, d, b.cosine + i);
  }
}

// first = first cos - second sin, second = first sin + second cos.
template <typename T>
HWY_INLINE void turn(T* first, T* second, const Buffers& b, std::int64_t pairs) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + lanes <= pairs; i += lanes) {
    const V x = simd::load_f32(d, first + i);
    const V y = simd::load_f32(d, second + i);
    const V sine = hn::Load(d, b.sine + i);
    const V cosine = hn::Load(d, b.cosine + i);
    simd::store_f32(d, hn::NegMulAdd(y, sine, hn::Mul(x, cosine)), first + i);
    simd::store_f32(d, hn::MulAdd(x, sine, hn::Mul(y, cosine)), second + i);
  }
  for (; i < pairs; ++i) {
    const auto x = static_cast<float>(first[i]);
    const auto y = static_cast<float>(second[i]);
    first[i] = T(x * b.cosine[i] - y * b.sine[i]);
    second[i] = T(x * b.sine[i] + y * b.cosine[i]);
  }
}

template <typename T>
void turn_tokens(const Problem& p, std::int64_t begin, std::int64_t end, const Buffers& b) {
  const std::int64_t pairs = p.pairs();
  const std::int64_t step = (p.interleaved ? 2 : 1) * p.channel_stride;        // from a pair to the next
  const std::int64_t across = (p.interleaved ? 1 : pairs) * p.channel_stride;  // inside a pair
  for (std::int64_t t = begin; t < end; ++t) {
    angles(p, p.positions[static_cast<std::size_t>(t)], b);
    for (std::int64_t h = 0; h < p.heads; ++h) {
      T* head = static_cast<T*>(p.x) + t * p.token_stride + h * p.head_stride;
      if (step == 1) {
        turn(head, head + across, b, pairs);
        continue;
      }
      for (std::int64_t i = 0; i < pairs; ++i) {
        b.first[i] = static_cast<float>(head[i * step]);
        b.second[i] = static_cast<float>(head[i * step + across]);
      }
      turn(b.first, b.second, b, pairs);
      for (std::int64_t i = 0; i < pairs; ++i) {
        head[i * step] = T(b.first[i]);
        head[i * step + across] = T(b.second[i]);
      }
    }
  }
}

void tokens(const Problem& p, std::int64_t begin, std::int64_t end, float* workspace) {
  const std::int64_t length = workspace_floats(p.pairs()) / 4;
  const Buffers b{workspace, workspace + length, workspace + 2 * length, workspace + 3 * length};
  switch (p.dtype) {
    case DType::bf16: return turn_tokens<bf16>(p, begin, end, b);
    case DType::f16: return turn_tokens<f16>(p, begin, end, b);
    default: return turn_tokens<float>(p, begin, end, b);
  }
}

}  // namespace krait::rotary_kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::rotary_kernels {

HWY_EXPORT(tokens);

void simd(const Problem& problem, std::int64_t begin, std::int64_t end, float* workspace) {
  HWY_DYNAMIC_DISPATCH(tokens)(problem, begin, end, workspace);
}

// Four rows, each padded to whole vectors of any target (at most 256 bytes).
std::int64_t workspace_floats(std::int64_t pairs) {
  constexpr std::int64_t kPadding = 64;
  return (pairs + kPadding - 1) / kPadding * kPadding * 4;
}

}  // namespace krait::rotary_kernels
#endif
