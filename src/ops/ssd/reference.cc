// ssd as it is defined: the recurrence, every tensor in f64, plain loops.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/ssd/problem.h"

namespace krait::ssd_detail {
namespace {

// A contiguous f64 copy; null where absent.
struct Values {
  Tensor copy;
  const double* data = nullptr;
  explicit Values(const Tensor& t) {
    if (!t) return;
    copy = t.to(DType::f64).contiguous();
    data = copy.data<double>();
  }
};

double softplus(double v) { return v > 20.0 ? v : std::log1p(std::exp(v)); }
double silu(double v) { return v / (1.0 + std::exp(-v)); }

// As std::clamp, and NaN for NaN.
double clamp(double v, const DtLimit& limit) {
  if (v < static_cast<double>(limit.low)) return static_cast<double>(limit.low);
  if (v > static_cast<double>(limit.high)) return static_cast<double>(limit.high);
  return v;
}

}  // namespace

void run_reference(Context&, const Problem& p) {
  const std::int64_t length = p.x.size(1);
  const std::int64_t heads = p.heads();
  const std::int64_t headdim = p.headdim();
  const std::int64_t d_state = p.d_state();
  const std::int64_t groups = p.groups();
  const Values x(p.x);
  const Values dt(p.dt);
  const Values A(p.A);
  const Values B(p.B);
  const Values C(p.C);
  const Values D(p.D);
  const Values z(p.z);
  const Values dt_bias(p.dt_bias);
  const Values initial(p.initial_states);
  const Tensor out = Tensor::zeros(p.x.shape(), DType::f64);
  const Tensor state = Tensor::empty({headdim, d_state}, DType::f64);
  double* S = state.data<double>();

  for (const TokenRun& run : p.runs->runs) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int64_t g = h / p.heads_per_group();
      const std::int64_t start = (run.sequence * heads + h) * headdim * d_state;
      for (std::int64_t i = 0; i < state.numel(); ++i)
        S[i] = run.first && p.initial_states ? initial.data[start + i] : 0.0;

      std::size_t request = run.requests_begin;
      const auto save = [&](const Tensor& to) { to.copy_from(state); };
      save_states(p, run, 0, h, request, save);
      for (std::int64_t i = 0; i < run.count; ++i) {
        const std::int64_t token = run.row * length + p.runs->position(run, i);
        const std::int64_t at = token * heads + h;
        double d = 1.0;
        double exponent = dt.data[at];
        if (!p.discrete) {
          d = dt.data[at] + (p.dt_bias ? dt_bias.data[h] : 0.0);
          d = clamp(p.dt_softplus ? softplus(d) : d, p.dt_limit);
          exponent = d * A.data[h];
        }
        const double decay = std::exp(exponent);
        const double* b = B.data + (token * groups + g) * d_state;
        const double* c = C.data + (token * groups + g) * d_state;
        for (std::int64_t q = 0; q < headdim; ++q) {
          const double in = x.data[at * headdim + q];
          double y = 0.0;
          for (std::int64_t n = 0; n < d_state; ++n) {
            double& s = S[q * d_state + n];
            s = decay * s + d * in * b[n];
            y += s * c[n];
          }
          if (p.D) y += D.data[h * headdim + q] * in;
          if (p.z) y *= silu(z.data[at * headdim + q]);
          out.data<double>()[at * headdim + q] = y;
        }
        save_states(p, run, i + 1, h, request, save);
      }
    }
  }
  p.out.copy_from(out);
}

}  // namespace krait::ssd_detail
