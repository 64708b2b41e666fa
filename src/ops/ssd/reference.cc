// ssd as it is defined, and its gradient: the recurrence, every tensor in f64, plain loops.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/view.h"
#include "ops/scalar.h"
#include "ops/ssd/backward.h"
#include "ops/ssd/problem.h"

namespace krait::ssd_detail {
namespace {

using scalar::silu;
using scalar::softplus;

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

namespace {

// A gradient in f64 that starts from 0.
struct Gradient {
  Tensor sums;
  View<double> at;
  explicit Gradient(const Dims& shape) : sums(Tensor::zeros(shape, DType::f64)), at(sums) {}
  void write_to(const Tensor& to) const {
    if (to) to.copy_from(sums);
  }
  void add_to(const Tensor& to) const {
    if (!to) return;
    const Tensor total = to.to(DType::f64).clone();
    for (std::int64_t i = 0; i < total.numel(); ++i) total.data<double>()[i] += sums.data<double>()[i];
    to.copy_from(total);
  }
};

// d of one token, and its derivative by dt.
struct Step {
  double d;
  double slope;
};

Step step_of(const Problem& p, double raw) {
  const double soft = p.dt_softplus ? softplus(raw) : raw;
  const double d = clamp(soft, p.dt_limit);
  if (d != soft) return {d, 0.0};
  return {d, p.dt_softplus && raw <= 20.0 ? 1.0 / (1.0 + std::exp(-raw)) : 1.0};
}

}  // namespace

// With G_t the gradient by S_t: G_t = dy_t C_t^T + exp(d_{t+1} A) G_{t+1}, walked from the last token to the
// first beside the states S_t, which are kept for the run and head at hand.
void run_reference_backward(Context&, const BackwardProblem& b) {
  const Problem& p = b.forward;
  const std::int64_t headdim = p.headdim();
  const std::int64_t d_state = p.d_state();
  const View<double> x(p.x), dt(p.dt), A(p.A), B(p.B), C(p.C), D(p.D), z(p.z), dt_bias(p.dt_bias);
  const View<double> initial(p.initial_states), dout(b.dout), dfinal(b.dfinal_states);
  const Dims state_shape{p.runs->sequences, p.heads(), headdim, d_state};
  Gradient dx(p.x.shape()), ddt(p.dt.shape()), dB(p.B.shape()), dC(p.C.shape()), dz(p.x.shape());
  Gradient dinitial(state_shape), dA({p.heads()}), dD({p.heads(), headdim}), ddt_bias({p.heads()});

  for (const TokenRun& run : p.runs->runs) {
    const std::int64_t r = run.row;
    const Tensor kept = Tensor::zeros({run.count + 1, headdim, d_state}, DType::f64);
    const Tensor gradient = Tensor::zeros({headdim, d_state}, DType::f64);
    const View<double> S(kept), G(gradient);  // S(i): the state before token i
    for (std::int64_t h = 0; h < p.heads(); ++h) {
      const std::int64_t g = h / p.heads_per_group();
      const auto step_at = [&](std::int64_t t) {
        return step_of(p, dt(r, t, h) + (p.dt_bias ? dt_bias(h) : 0.0));
      };
      for (std::int64_t q = 0; q < headdim; ++q) {
        for (std::int64_t n = 0; n < d_state; ++n) {
          S(0, q, n) = run.first && p.initial_states ? initial(run.sequence, h, q, n) : 0.0;
          G(q, n) = run.last && b.dfinal_states ? dfinal(run.sequence, h, q, n) : 0.0;
        }
      }
      for (std::int64_t i = 0; i < run.count; ++i) {
        const std::int64_t t = p.runs->position(run, i);
        const double d = step_at(t).d;
        const double decay = std::exp(d * A(h));
        for (std::int64_t q = 0; q < headdim; ++q)
          for (std::int64_t n = 0; n < d_state; ++n)
            S(i + 1, q, n) = decay * S(i, q, n) + d * x(r, t, h, q) * B(r, t, g, n);
      }

      for (std::int64_t i = run.count - 1; i >= 0; --i) {
        const std::int64_t t = p.runs->position(run, i);
        const auto [d, slope] = step_at(t);
        const double decay = std::exp(d * A(h));
        double dd = 0.0;
        double ddecay = 0.0;
        for (std::int64_t q = 0; q < headdim; ++q) {
          const double in = x(r, t, h, q);
          const double skip = p.D ? D(h, q) : 0.0;
          double dy = dout(r, t, h, q);
          if (p.z) {
            double y = skip * in;
            for (std::int64_t n = 0; n < d_state; ++n) y += S(i + 1, q, n) * C(r, t, g, n);
            const double gate = z(r, t, h, q);
            const double sigmoid = 1.0 / (1.0 + std::exp(-gate));
            dz.at(r, t, h, q) = dy * y * sigmoid * (1.0 + gate * (1.0 - sigmoid));
            dy *= silu(gate);
          }
          double sum = 0.0;  // of G B
          for (std::int64_t n = 0; n < d_state; ++n) {
            dC.at(r, t, g, n) += dy * S(i + 1, q, n);
            G(q, n) += dy * C(r, t, g, n);
            dB.at(r, t, g, n) += d * in * G(q, n);
            sum += G(q, n) * B(r, t, g, n);
            ddecay += G(q, n) * S(i, q, n);
            G(q, n) *= decay;
          }
          dx.at(r, t, h, q) = d * sum + skip * dy;
          dd += in * sum;
          dD.at(h, q) += dy * in;
        }
        dd += ddecay * decay * A(h);
        dA.at(h) += ddecay * decay * d;
        ddt.at(r, t, h) = dd * slope;
        ddt_bias.at(h) += dd * slope;
      }
      if (run.first)
        for (std::int64_t q = 0; q < headdim; ++q)
          for (std::int64_t n = 0; n < d_state; ++n) dinitial.at(run.sequence, h, q, n) = G(q, n);
    }
  }
  dx.write_to(b.dx);
  ddt.write_to(b.ddt);
  dB.write_to(b.dB);
  dC.write_to(b.dC);
  dz.write_to(b.dz);
  dinitial.write_to(b.dinitial_states);
  dA.add_to(b.dA);
  ddt_bias.add_to(b.ddt_bias);
  if (b.dD && b.dD.ndim() == 1) {
    Gradient by_head({p.heads()});
    for (std::int64_t h = 0; h < p.heads(); ++h)
      for (std::int64_t q = 0; q < headdim; ++q) by_head.at(h) += dD.at(h, q);
    by_head.add_to(b.dD);
  } else {
    dD.add_to(b.dD);
  }
}

}  // namespace krait::ssd_detail
