#include <algorithm>
#include <complex>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/view.h"
#include "ops/selective_scan/reference.h"
#include "ops/selective_scan/scan.h"

namespace krait::scan {
namespace {

// A gradient of B or C, to which each channel adds: constant ones from what is there, variable ones from 0.
template <typename S, typename State>
class FactorGradient {
 public:
  explicit FactorGradient(const Tensor& gradient)
      : destination_(gradient),
        sums_(!gradient || gradient.ndim() == 2 ? gradient : Tensor::zeros(gradient.shape(), dtype_of<S>)),
        constant_(gradient && gradient.ndim() == 2 ? sums_ : Tensor()),
        variable_(gradient && gradient.ndim() == 4 ? sums_ : Tensor()) {}

  void add(std::int64_t batch, std::int64_t g, std::int64_t d, std::int64_t n, std::int64_t t,
           State value) const {
    if (constant_) constant_(d, n) += value;
    if (!variable_) return;
    const std::int64_t group = sums_.size(1) == 1 ? 0 : g;
    if constexpr (std::is_same_v<S, State>) {
      variable_(batch, group, n, t) += value;
    } else {
      variable_(batch, group, n, 2 * t) += value.real();
      variable_(batch, group, n, 2 * t + 1) += value.imag();
    }
  }
  void store() const {
    if (constant_) constant_.store(destination_);
    if (variable_) variable_.store(destination_);
  }

 private:
  Tensor destination_;
  Tensor sums_;
  View<State> constant_;
  View<S> variable_;
};

template <typename T>
T conjugate(T x) {
  if constexpr (std::is_floating_point_v<T>)
    return x;
  else
    return std::conj(x);
}

// S and State are those of the forward. The gradient of a loss with respect to a complex x is
// d/d(re x) + i d/d(im x); through w = f x it is conj(f) times that of w.
template <typename S, typename State>
void run(const Problem& p, const Gradients& gradients) {
  const View<S> u(p.u);
  const View<S> delta(p.delta);
  const View<State> A(p.A);
  const Factor<S, State> B(p.B);
  const Factor<S, State> C(p.C);
  const View<S> D(p.D);
  const View<S> z(p.z);
  const View<S> delta_bias(p.delta_bias);
  const View<State> initial_state(p.initial_state);
  const View<S> dout(gradients.dout);
  const View<State> dlast_state(gradients.dlast_state);
  const View<S> du(gradients.du);
  const View<S> ddelta(gradients.ddelta);
  const View<S> dz(gradients.dz);
  const View<State> dinitial_state(gradients.dinitial_state);
  const FactorGradient<S, State> dB(gradients.dB);
  const FactorGradient<S, State> dC(gradients.dC);
  const View<State> dA(gradients.dA);
  const View<S> dD(gradients.dD);
  const View<S> ddelta_bias(gradients.ddelta_bias);

  struct Step {
    bool padding = false;
    bool restart = false;
    S raw = 0;  // delta + delta_bias
    S dt = 0;
  };
  const S two = std::is_same_v<S, State> ? S(1) : S(2);  // y counts a complex state twice
  const std::int64_t channels_per_group = p.channels / p.groups;
  const std::int64_t N = p.d_state;
  std::vector<Step> steps;
  std::vector<State> states;  // (step, state) of one channel: after each step, before the first one at 0
  std::vector<State> dh(N);   // the gradient of the state after a step
  for (const Row& row : p.rows) {
    const std::int64_t b = row.batch;
    steps.resize(row.length);
    states.resize((row.length + 1) * N);
    for (std::int64_t d = 0; d < p.channels; ++d) {
      const std::int64_t g = d / channels_per_group;
      for (std::int64_t n = 0; n < N; ++n)
        states[n] = initial_state ? initial_state(row.state, d, n) : State(0);
      std::int64_t sequence = -1;  // that of the last real token
      for (std::int64_t i = 0; i < row.length; ++i) {
        const std::int64_t t = p.token(row, i);
        const std::int64_t here = sequence_of(p, row, i);
        State* const h = states.data() + i * N;
        Step& step = steps[i];
        step.padding = here < 0;
        if (step.padding) {
          std::copy(h, h + N, h + N);
          continue;
        }
        step.restart = sequence >= 0 && here != sequence;
        sequence = here;
        step.raw = delta(b, d, t) + (delta_bias ? delta_bias(d) : S(0));
        step.dt = p.delta_softplus ? softplus(step.raw) : step.raw;
        for (std::int64_t n = 0; n < N; ++n) {
          const State carried = step.restart ? State(0) : std::exp(step.dt * A(d, n)) * h[n];
          h[N + n] = carried + step.dt * u(b, d, t) * B(b, g, d, n, t);
        }
      }

      for (std::int64_t n = 0; n < N; ++n) dh[n] = dlast_state ? dlast_state(row.state, d, n) : State(0);
      for (std::int64_t i = row.length - 1; i >= 0; --i) {
        const std::int64_t t = p.token(row, i);
        const Step& step = steps[i];
        if (step.padding) {
          for (const View<S>* gradient : {&du, &ddelta, &dz})
            if (*gradient) (*gradient)(b, d, t) = S(0);
          continue;
        }
        const State* const h = states.data() + (i + 1) * N;
        const State* const before = states.data() + i * N;
        const S x = u(b, d, t);
        S y = D ? D(d) * x : S(0);
        for (std::int64_t n = 0; n < N; ++n) y += two * std::real(C(b, g, d, n, t) * h[n]);
        S dy = dout(b, d, t);
        if (z) {
          const S gate = z(b, d, t);
          const S sigmoid = S(1) / (S(1) + std::exp(-gate));
          if (dz) dz(b, d, t) = dy * y * sigmoid * (S(1) + gate * (S(1) - sigmoid));
          dy *= gate * sigmoid;
        }
        S dinput = 0;  // of dt u
        S ddt = 0;
        for (std::int64_t n = 0; n < N; ++n) {
          dC.add(b, g, d, n, t, two * dy * conjugate(h[n]));
          dh[n] += two * dy * conjugate(C(b, g, d, n, t));
          dB.add(b, g, d, n, t, dh[n] * step.dt * x);
          dinput += std::real(dh[n] * conjugate(B(b, g, d, n, t)));
          const State decay = step.restart ? State(0) : std::exp(step.dt * A(d, n));
          // Through exp(dt A) h: the gradient of the exponent dt A.
          const State dexponent = dh[n] * conjugate(decay * before[n]);
          ddt += std::real(dexponent * conjugate(A(d, n)));
          if (dA) dA(d, n) += dexponent * step.dt;
          dh[n] *= conjugate(decay);
        }
        const S slope = p.delta_softplus && step.raw <= S(20) ? S(1) / (S(1) + std::exp(-step.raw)) : S(1);
        ddt = (ddt + dinput * x) * slope;
        if (du) du(b, d, t) = dinput * step.dt + (D ? D(d) * dy : S(0));
        if (ddelta) ddelta(b, d, t) = ddt;
        if (dD) dD(d) += dy * x;
        if (ddelta_bias) ddelta_bias(d) += ddt;
      }
      if (dinitial_state)
        for (std::int64_t n = 0; n < N; ++n) dinitial_state(row.state, d, n) = dh[n];
    }
  }
  for (const auto& [view, tensor] :
       {std::pair(&du, &gradients.du), std::pair(&ddelta, &gradients.ddelta), std::pair(&dz, &gradients.dz),
        std::pair(&dD, &gradients.dD), std::pair(&ddelta_bias, &gradients.ddelta_bias)})
    if (*view) view->store(*tensor);
  if (dinitial_state) dinitial_state.store(gradients.dinitial_state);
  if (dA) dA.store(gradients.dA);
  dB.store();
  dC.store();
}

}  // namespace

void run_reference_backward(const Problem& p, const Gradients& gradients) {
  const bool in_double = p.A.dtype() == DType::f64 || p.A.dtype() == DType::c128;
  if (p.complex)
    in_double ? run<double, std::complex<double>>(p, gradients)
              : run<float, std::complex<float>>(p, gradients);
  else
    in_double ? run<double, double>(p, gradients) : run<float, float>(p, gradients);
}

}  // namespace krait::scan
