#include <algorithm>
#include <cmath>
#include <complex>
#include <vector>

#include "core/view.h"
#include "ops/selective_scan/reference.h"
#include "ops/selective_scan/scan.h"

namespace krait::scan {
namespace {

// S is the scalar of the computation, State is S, or complex<S> where A is complex.
template <typename S, typename State>
void run(const Problem& p) {
  constexpr bool kComplex = !std::is_same_v<S, State>;
  const View<S> u(p.u);
  const View<S> delta(p.delta);
  const View<State> A(p.A);
  const Factor<S, State> B(p.B);
  const Factor<S, State> C(p.C);
  const View<S> D(p.D);
  const View<S> z(p.z);
  const View<S> delta_bias(p.delta_bias);
  const View<State> initial_state(p.initial_state);
  const View<std::int64_t> seq_idx(p.seq_idx);
  const View<S> out(p.out);
  const View<State> last_state(p.last_state);
  const View<State> states(p.states);

  const std::int64_t channels_per_group = p.channels / p.groups;
  std::vector<State> h(static_cast<std::size_t>(p.d_state));
  auto save = p.saves.begin();
  for (std::int64_t r = 0; r < std::ssize(p.rows); ++r) {
    const Row& row = p.rows[static_cast<std::size_t>(r)];
    const std::int64_t b = row.batch;
    const auto first_save = save;
    for (std::int64_t d = 0; d < p.channels; ++d) {
      const std::int64_t g = d / channels_per_group;
      for (std::int64_t n = 0; n < p.d_state; ++n)
        h[static_cast<std::size_t>(n)] = initial_state ? initial_state(row.state, d, n) : State(0);

      std::int64_t sequence = -1;  // that of the last real token
      save = first_save;
      for (std::int64_t step = 0; step < row.length; ++step) {
        const std::int64_t t = p.token(row, step);
        const std::int64_t here = seq_idx ? seq_idx(b, t) : 0;
        if (here < 0) {
          out(b, d, t) = S(0);
        } else {
          if (sequence >= 0 && here != sequence) std::fill(h.begin(), h.end(), State(0));
          sequence = here;

          S dt = delta(b, d, t) + (delta_bias ? delta_bias(d) : S(0));
          if (p.delta_softplus) dt = softplus(dt);
          const S x = u(b, d, t);
          S y = 0;
          for (std::int64_t n = 0; n < p.d_state; ++n) {
            State& state = h[static_cast<std::size_t>(n)];
            state = std::exp(dt * A(d, n)) * state + dt * x * B(b, g, d, n, t);
            if constexpr (kComplex)
              y += 2 * std::real(C(b, g, d, n, t) * state);
            else
              y += C(b, g, d, n, t) * state;
          }
          if (D) y += D(d) * x;
          if (z) y *= silu(z(b, d, t));
          out(b, d, t) = y;
        }
        for (; save != p.saves.end() && save->row == r && save->step == step; ++save)
          for (std::int64_t n = 0; n < p.d_state; ++n)
            states(b, save->slot, d, n) = h[static_cast<std::size_t>(n)];
      }
      if (last_state)
        for (std::int64_t n = 0; n < p.d_state; ++n)
          last_state(row.state, d, n) = h[static_cast<std::size_t>(n)];
    }
  }
  out.store(p.out);
  if (last_state) last_state.store(p.last_state);
}

}  // namespace

void run_reference(const Problem& p) {
  const bool in_double = p.A.dtype() == DType::f64 || p.A.dtype() == DType::c128;
  if (p.complex)
    in_double ? run<double, std::complex<double>>(p) : run<float, std::complex<float>>(p);
  else
    in_double ? run<double, double>(p) : run<float, float>(p);
}

}  // namespace krait::scan
