// The definition, a row at a time, in f64.
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "ops/norm/kernels.h"
#include "ops/scalar.h"

namespace krait::norm_kernels {
namespace {

using scalar::silu;
using scalar::silu_derivative;

void read(const Rows& rows, std::int64_t row, std::vector<double>& to) {
  dispatch_float(rows.dtype(), "tensor", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* from = static_cast<const T*>(rows.row(row));
    std::int64_t at = 0;
    for (double& value : to) {
      value = static_cast<double>(from[at]);
      at += rows.channel_stride();
    }
  });
}

void write(const std::vector<double>& from, const Rows& rows, std::int64_t row) {
  dispatch_float(rows.dtype(), "tensor", [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* to = static_cast<T*>(rows.row(row));
    std::int64_t at = 0;
    for (const double value : from) {
      // 16-bit types convert from f32: rounding twice is what every path does.
      if constexpr (std::is_same_v<T, double>)
        to[at] = value;
      else
        to[at] = T(static_cast<float>(value));
      at += rows.channel_stride();
    }
  });
}

// Returns the factor, 1 / sqrt(variance + eps).
double normalise(NormKind kind, double eps, double* r, std::int64_t n) {
  const auto count = static_cast<double>(n);
  double mean = 0.0;
  if (kind == NormKind::layer) {
    for (std::int64_t i = 0; i < n; ++i) mean += r[i];
    mean /= count;
  }
  double square = 0.0;
  for (std::int64_t i = 0; i < n; ++i) square += (r[i] - mean) * (r[i] - mean);
  const double rstd = 1.0 / std::sqrt(square / count + eps);
  for (std::int64_t i = 0; i < n; ++i) r[i] = (r[i] - mean) * rstd;
  return rstd;
}

// dn, the gradient of the normalised n values, becomes that of the values before.
void normalise_backward(NormKind kind, double rstd, const double* normalised, double* dn, std::int64_t n) {
  const auto count = static_cast<double>(n);
  double mean = 0.0;     // of dn: what the subtraction of the mean takes away
  double product = 0.0;  // of dn and the normalised values: what the division by the deviation takes away
  for (std::int64_t i = 0; i < n; ++i) {
    if (kind == NormKind::layer) mean += dn[i] / count;
    product += dn[i] * normalised[i] / count;
  }
  for (std::int64_t i = 0; i < n; ++i) dn[i] = rstd * (dn[i] - mean - normalised[i] * product);
}

void add(const std::vector<double>& sums, const Rows& to) {
  std::vector<double> total(sums.size());
  read(to, 0, total);
  for (std::size_t c = 0; c < sums.size(); ++c) total[c] += sums[c];
  write(total, to, 0);
}

}  // namespace

void reference(const Problem& p) {
  const auto channels = static_cast<std::size_t>(p.channels);
  std::vector<double> r(channels);
  std::vector<double> other(channels);
  std::vector<double> weight(channels, 1.0);
  std::vector<double> bias(channels, 0.0);
  std::vector<double> gate(channels, 1.0);
  if (p.weight) read(p.weight, 0, weight);
  if (p.bias) read(p.bias, 0, bias);
  for (std::int64_t row = 0; row < p.rows; ++row) {
    read(p.x, row, r);
    if (p.residual) {
      read(p.residual, row, other);
      for (std::size_t c = 0; c < channels; ++c) r[c] += other[c];
    }
    if (p.z) {
      read(p.z, row, gate);
      for (double& value : gate) value = silu(value);
    }
    if (p.residual_out) write(r, p.residual_out, row);
    if (p.z && !p.norm_before_gate)
      for (std::size_t c = 0; c < channels; ++c) r[c] *= gate[c];
    for (std::int64_t at = 0; at < p.channels; at += p.group_size)
      normalise(p.kind, p.eps, r.data() + at, p.group_size);
    for (std::size_t c = 0; c < channels; ++c) r[c] = r[c] * weight[c] + bias[c];
    if (p.z && p.norm_before_gate)
      for (std::size_t c = 0; c < channels; ++c) r[c] *= gate[c];
    write(r, p.out, row);
  }
}

void reference(const BackwardProblem& p) {
  const auto channels = static_cast<std::size_t>(p.channels);
  std::vector<double> x(channels);
  std::vector<double> z(channels, 0.0);
  std::vector<double> gate(channels, 1.0);
  std::vector<double> weight(channels, 1.0);
  std::vector<double> bias(channels, 0.0);
  std::vector<double> dout(channels);
  std::vector<double> dresidual(channels, 0.0);
  std::vector<double> dz(channels);
  std::vector<double> dweight(channels, 0.0);
  std::vector<double> dbias(channels, 0.0);
  std::vector<double> rstd(channels);
  const bool gate_first = p.z && !p.norm_before_gate;
  const bool gate_last = p.z && p.norm_before_gate;
  if (p.weight) read(p.weight, 0, weight);
  if (p.bias) read(p.bias, 0, bias);
  for (std::int64_t row = 0; row < p.rows; ++row) {
    read(p.x, row, x);
    read(p.dout, row, dout);
    if (p.dresidual) read(p.dresidual, row, dresidual);
    if (p.z) {
      read(p.z, row, z);
      for (std::size_t c = 0; c < channels; ++c) gate[c] = silu(z[c]);
    }

    // Forward again, up to the normalised values.
    std::vector<double> normalised = x;
    if (gate_first)
      for (std::size_t c = 0; c < channels; ++c) normalised[c] *= gate[c];
    for (std::int64_t at = 0; at < p.channels; at += p.group_size)
      rstd[static_cast<std::size_t>(at)] = normalise(p.kind, p.eps, normalised.data() + at, p.group_size);

    // And back: `d` is the gradient of the latest value.
    std::vector<double> d = dout;
    if (gate_last) {
      for (std::size_t c = 0; c < channels; ++c) {
        dz[c] = d[c] * (normalised[c] * weight[c] + bias[c]) * silu_derivative(z[c]);
        d[c] *= gate[c];
      }
    }
    for (std::size_t c = 0; c < channels; ++c) {
      dbias[c] += d[c];
      dweight[c] += d[c] * normalised[c];
      d[c] *= weight[c];
    }
    for (std::int64_t at = 0; at < p.channels; at += p.group_size)
      normalise_backward(p.kind, rstd[static_cast<std::size_t>(at)], normalised.data() + at, d.data() + at,
                         p.group_size);
    if (gate_first) {
      for (std::size_t c = 0; c < channels; ++c) {
        dz[c] = d[c] * x[c] * silu_derivative(z[c]);
        d[c] *= gate[c];
      }
    }
    for (std::size_t c = 0; c < channels; ++c) d[c] += dresidual[c];
    if (p.dx) write(d, p.dx, row);
    if (p.dz) write(dz, p.dz, row);
  }
  if (p.dweight) add(dweight, p.dweight);
  if (p.dbias) add(dbias, p.dbias);
}

}  // namespace krait::norm_kernels
