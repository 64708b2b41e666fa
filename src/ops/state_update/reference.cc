#include <algorithm>
#include <cmath>

#include "core/view.h"
#include "krait/core/dtype.h"
#include "ops/scalar.h"
#include "ops/state_update/update.h"

namespace krait::update {
namespace {

using scalar::silu;
using scalar::softplus;

// What a state of `dtype` keeps of `value`.
template <typename S>
S rounded(S value, DType dtype) {
  switch (dtype) {
    case DType::f32: return static_cast<float>(value);
    case DType::bf16: return static_cast<float>(bf16(static_cast<float>(value)));
    case DType::f16: return static_cast<float>(f16(static_cast<float>(value)));
    default: return value;
  }
}

template <typename S>
void run(const Problem& p) {
  const View<S> state(p.state);
  const View<S> x(p.x);
  const View<S> dt(p.dt);
  const View<S> A(p.A);
  const View<S> B(p.B);
  const View<S> C(p.C);
  const View<S> D(p.D);
  const View<S> z(p.z);
  const View<S> dt_bias(p.dt_bias);
  const View<S> out(p.out);
  const S low = p.dt_limit.low;
  const S high = p.dt_limit.high;

  for (std::int64_t b = 0; b < p.batch(); ++b) {
    const std::int64_t row = p.rows[static_cast<std::size_t>(b)];
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      for (std::int64_t h = 0; h < p.heads; ++h) {
        const std::int64_t g = p.group(h);
        for (std::int64_t c = 0; c < p.headdim; ++c) {
          if (row < 0) {
            out(b, t, h, c) = S(0);
            continue;
          }
          S step = dt(b, t, h, c) + (dt_bias ? dt_bias(h, c) : S(0));
          if (p.dt_softplus) step = softplus(step);
          step = std::clamp(step, low, high);
          const S input = x(b, t, h, c);
          S y = 0;
          for (std::int64_t n = 0; n < p.d_state; ++n) {
            S& s = state(row, h, c, n);
            const S next = std::exp(step * A(h, c, n)) * s + step * input * B(b, t, g, n);
            y += next * C(b, t, g, n);
            s = rounded(next, p.state.dtype());
          }
          if (D) y += D(h, c) * input;
          if (z) y *= silu(z(b, t, h, c));
          out(b, t, h, c) = y;
        }
      }
    }
  }
  state.store(p.state);
  out.store(p.out);
}

}  // namespace

void run_reference(const Problem& problem, bool in_double) {
  in_double ? run<double>(problem) : run<float>(problem);
}

}  // namespace krait::update
