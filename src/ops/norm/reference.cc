// The definition, a row at a time, in f64.
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "ops/norm/kernels.h"

namespace krait::norm_kernels {
namespace {

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

double silu(double x) { return x / (1.0 + std::exp(-x)); }

void normalise(NormKind kind, double eps, double* r, std::int64_t n) {
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

}  // namespace krait::norm_kernels
