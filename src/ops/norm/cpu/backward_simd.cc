// The backward of norm, a row at a time: each operand is read once into f32 in the first-level cache, where
// the forward is repeated up to the normalised values and then walked back. Sums over rows are kept beside
// it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/norm/cpu/backward_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>

#include "core/simd/math-inl.h"
#include "ops/norm/cpu/rows-inl.h"
#include "ops/norm/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::norm_kernels::HWY_NAMESPACE {
namespace {

// Row buffers of padded(channels) floats. Whole vectors are computed; what stands in the padding is not used.
struct Buffers {
  float* x;           // the input; where the gate comes first
  float* normalised;  // (g - mean) * rstd
  float* gradient;    // on its way back
  float* gate;        // silu(z); later dresidual
  float* dgate;       // silu'(z), then dz
  float* rstd;        // one value a group
};

// n = normalised * weight + bias was multiplied by the gate: dz = gradient n silu'(z); the gradient becomes
// that of n.
void gate_backward(const Buffers& b, const float* weight, const float* bias, std::int64_t n) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < n; i += lanes) {
    V value = hn::Load(d, b.normalised + i);
    if (weight != nullptr) value = hn::Mul(value, hn::Load(d, weight + i));
    if (bias != nullptr) value = hn::Add(value, hn::Load(d, bias + i));
    const V gradient = hn::Load(d, b.gradient + i);
    hn::Store(hn::Mul(hn::Mul(gradient, value), hn::Load(d, b.dgate + i)), d, b.dgate + i);
    hn::Store(hn::Mul(gradient, hn::Load(d, b.gate + i)), d, b.gradient + i);
  }
}

// x was multiplied by the gate: dz = gradient x silu'(z); the gradient becomes that of x.
void input_gate_backward(const Buffers& b, std::int64_t n) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < n; i += lanes) {
    const V gradient = hn::Load(d, b.gradient + i);
    const V slope = hn::Mul(hn::Load(d, b.x + i), hn::Load(d, b.dgate + i));
    hn::Store(hn::Mul(gradient, slope), d, b.dgate + i);
    hn::Store(hn::Mul(gradient, hn::Load(d, b.gate + i)), d, b.gradient + i);
  }
}

// Adds to the sums over rows; the gradient becomes that of the normalised values.
void scale_backward(const Buffers& b, const float* weight, float* dweight, float* dbias, std::int64_t n) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i < n; i += lanes) {
    const V gradient = hn::Load(d, b.gradient + i);
    if (dbias != nullptr) hn::Store(hn::Add(hn::Load(d, dbias + i), gradient), d, dbias + i);
    if (dweight != nullptr)
      hn::Store(hn::MulAdd(gradient, hn::Load(d, b.normalised + i), hn::Load(d, dweight + i)), d,
                dweight + i);
    if (weight != nullptr) hn::Store(hn::Mul(gradient, hn::Load(d, weight + i)), d, b.gradient + i);
  }
}

// One group: gradient = rstd (gradient - mean(gradient) - normalised mean(gradient normalised)); the first
// mean only where the forward subtracted one.
HWY_INLINE void normalise_backward(NormKind kind, float rstd_value, const float* HWY_RESTRICT normalised,
                                   float* HWY_RESTRICT gradient, std::int64_t n) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto count = static_cast<double>(n);
  const auto mean_of = [count](float total) {
    return static_cast<float>(static_cast<double>(total) / count);
  };
  const float product_value =
      mean_of(sum(gradient, normalised, n, [](V g, V v) HWY_ATTR { return hn::Mul(g, v); }));
  const float mean_value =
      kind == NormKind::layer ? mean_of(sum(gradient, gradient, n, [](V g, V) HWY_ATTR { return g; })) : 0.0F;
  const V product = hn::Set(d, product_value);
  const V mean = hn::Set(d, mean_value);
  const V rstd = hn::Set(d, rstd_value);
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const V centred = hn::Sub(hn::LoadU(d, gradient + i), mean);
    const V v = hn::NegMulAdd(hn::LoadU(d, normalised + i), product, centred);
    hn::StoreU(hn::Mul(v, rstd), d, gradient + i);
  }
  for (; i < n; ++i) gradient[i] = (gradient[i] - mean_value - normalised[i] * product_value) * rstd_value;
}

void backward_rows(const BackwardProblem& p, std::int64_t begin, std::int64_t end, float* dweight,
                   float* dbias, float* workspace) {
  const std::int64_t n = p.channels;
  const std::int64_t size = padded(n);
  const bool gate_first = p.z && !p.norm_before_gate;
  const Buffers b{.x = gate_first ? workspace : workspace + size,
                  .normalised = workspace + size,
                  .gradient = workspace + 2 * size,
                  .gate = workspace + 3 * size,
                  .dgate = workspace + 4 * size,
                  .rstd = workspace + 5 * size};
  const auto* weight = p.weight ? static_cast<const float*>(p.weight.row(0)) : nullptr;
  const auto* bias = p.bias ? static_cast<const float*>(p.bias.row(0)) : nullptr;
  const bool to_input = p.dx || (p.dz && gate_first);
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::fill_n(workspace, 5 * size, 0.0F);
  if (dweight != nullptr) std::fill_n(dweight, size, 0.0F);
  if (dbias != nullptr) std::fill_n(dbias, size, 0.0F);

  for (std::int64_t row = begin; row < end; ++row) {
    read(p.x, row, n, b.x);
    read(p.dout, row, n, b.gradient);
    if (p.z) {
      read(p.z, row, n, b.gate);
      for (std::int64_t i = 0; i < n; i += lanes) {
        V value = hn::Zero(d);
        V derivative = value;
        simd::silu_with_derivative(d, hn::Load(d, b.gate + i), value, derivative);
        hn::Store(value, d, b.gate + i);
        hn::Store(derivative, d, b.dgate + i);
        if (gate_first) hn::Store(hn::Mul(value, hn::Load(d, b.x + i)), d, b.normalised + i);
      }
    }
    std::int64_t group = 0;
    for (std::int64_t at = 0; at < n; at += p.group_size) {
      const Moments m = moments(p.kind, p.eps, b.normalised + at, p.group_size);
      apply(m, nullptr, nullptr, b.normalised + at, p.group_size);
      b.rstd[group++] = m.rstd;
    }

    if (p.z && !gate_first) gate_backward(b, weight, bias, n);
    scale_backward(b, weight, dweight, dbias, n);
    if (to_input) {
      group = 0;
      for (std::int64_t at = 0; at < n; at += p.group_size)
        normalise_backward(p.kind, b.rstd[group++], b.normalised + at, b.gradient + at, p.group_size);
      if (gate_first) input_gate_backward(b, n);
    }
    if (p.dx) {
      if (p.dresidual) {
        read(p.dresidual, row, n, b.gate);
        combine(b.gradient, b.gate, n, [](V x, V y) HWY_ATTR { return hn::Add(x, y); });
      }
      write(b.gradient, n, p.dx, row);
    }
    if (p.dz) write(b.dgate, n, p.dz, row);
  }
}

}  // namespace
}  // namespace krait::norm_kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::norm_kernels {

HWY_EXPORT(backward_rows);

void simd(const BackwardProblem& problem, std::int64_t begin, std::int64_t end, float* dweight, float* dbias,
          float* workspace) {
  HWY_DYNAMIC_DISPATCH(backward_rows)(problem, begin, end, dweight, dbias, workspace);
}

}  // namespace krait::norm_kernels
#endif
