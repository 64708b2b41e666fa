// The definition, a query at a time, in f64.
#include <cmath>
#include <cstddef>
#include <vector>

#include "core/dispatch.h"
#include "ops/attention/kernels.h"

namespace krait::attention_kernels {
namespace {

double element(const Operand& o, std::int64_t position, std::int64_t head, std::int64_t channel = 0) {
  const std::int64_t at = position * o.position_stride + head * o.head_stride + channel * o.channel_stride;
  return dispatch_float(o.dtype, "tensor", [&](auto tag) {
    return static_cast<double>(static_cast<const typename decltype(tag)::type*>(o.data)[at]);
  });
}

void store(double value, const Operand& o, std::int64_t position, std::int64_t head,
           std::int64_t channel = 0) {
  const std::int64_t at = position * o.position_stride + head * o.head_stride + channel * o.channel_stride;
  dispatch_float(o.dtype, "tensor", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, double>)
      static_cast<T*>(o.data)[at] = value;
    else
      static_cast<T*>(o.data)[at] = T(static_cast<float>(value));
  });
}

// One head of an operand.
struct Matrix {
  std::int64_t width = 0;
  std::vector<double> values;  // (positions, width)

  Matrix(std::int64_t positions, std::int64_t columns)
      : width(columns), values(static_cast<std::size_t>(positions * columns)) {}
  Matrix(const Operand& o, std::int64_t head, std::int64_t positions, std::int64_t columns)
      : Matrix(positions, columns) {
    for (std::int64_t i = 0; i < positions; ++i)
      for (std::int64_t c = 0; c < width; ++c) row(i)[c] = element(o, i, head, c);
  }

  [[nodiscard]] double* row(std::int64_t position) { return values.data() + position * width; }
  [[nodiscard]] const double* row(std::int64_t position) const { return values.data() + position * width; }
  void store_to(const Operand& o, std::int64_t head, std::int64_t positions) const {
    if (o.data == nullptr) return;
    for (std::int64_t i = 0; i < positions; ++i)
      for (std::int64_t c = 0; c < width; ++c) store(row(i)[c], o, i, head, c);
  }
};

double dot(const double* a, const double* b, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

void add_multiple(double factor, const double* from, std::int64_t n, double* to) {
  for (std::int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

}  // namespace

void reference(const Problem& p) {
  std::vector<double> weights(static_cast<std::size_t>(p.keys));
  for (std::int64_t head = 0; head < p.heads_kv * p.group; ++head) {
    const Matrix q(p.q, head, p.queries, p.head_dim);
    const Matrix k(p.k, head / p.group, p.keys, p.head_dim);
    const Matrix v(p.v, head / p.group, p.keys, p.head_dim_v);
    Matrix out(p.queries, p.head_dim_v);
    for (std::int64_t i = 0; i < p.queries; ++i) {
      const std::int64_t visible = p.visible(i);
      double largest = -INFINITY;
      for (std::int64_t j = 0; j < visible; ++j) {
        weights[static_cast<std::size_t>(j)] = p.scale * dot(q.row(i), k.row(j), p.head_dim);
        largest = std::fmax(largest, weights[static_cast<std::size_t>(j)]);
      }
      double total = 0.0;
      for (std::int64_t j = 0; j < visible; ++j) {
        double& weight = weights[static_cast<std::size_t>(j)];
        weight = std::exp(weight - largest);
        total += weight;
      }
      for (std::int64_t j = 0; j < visible; ++j)
        add_multiple(weights[static_cast<std::size_t>(j)] / total, v.row(j), p.head_dim_v, out.row(i));
      if (p.logsumexp.data != nullptr) store(largest + std::log(total), p.logsumexp, i, head);
    }
    out.store_to(p.out, head, p.queries);
  }
}

void reference_backward(const Problem& p, const Gradients& g) {
  for (std::int64_t head_kv = 0; head_kv < p.heads_kv; ++head_kv) {
    const Matrix k(p.k, head_kv, p.keys, p.head_dim);
    const Matrix v(p.v, head_kv, p.keys, p.head_dim_v);
    Matrix dk(p.keys, p.head_dim);
    Matrix dv(p.keys, p.head_dim_v);
    for (std::int64_t head = head_kv * p.group; head < (head_kv + 1) * p.group; ++head) {
      const Matrix q(p.q, head, p.queries, p.head_dim);
      const Matrix out(p.out, head, p.queries, p.head_dim_v);
      const Matrix dout(g.dout, head, p.queries, p.head_dim_v);
      Matrix dq(p.queries, p.head_dim);
      for (std::int64_t i = 0; i < p.queries; ++i) {
        const double logsumexp = element(p.logsumexp, i, head);
        // The weights of a row sum to 1: what all dweights have in common does not reach the scores.
        const double mean_dweight = dot(dout.row(i), out.row(i), p.head_dim_v);
        for (std::int64_t j = 0; j < p.visible(i); ++j) {
          const double weight = std::exp(p.scale * dot(q.row(i), k.row(j), p.head_dim) - logsumexp);
          const double dweight = dot(dout.row(i), v.row(j), p.head_dim_v);
          const double dproduct = p.scale * weight * (dweight - mean_dweight);
          add_multiple(weight, dout.row(i), p.head_dim_v, dv.row(j));
          add_multiple(dproduct, q.row(i), p.head_dim, dk.row(j));
          add_multiple(dproduct, k.row(j), p.head_dim, dq.row(i));
        }
      }
      dq.store_to(g.dq, head, p.queries);
    }
    dk.store_to(g.dk, head_kv, p.keys);
    dv.store_to(g.dv, head_kv, p.keys);
  }
}

}  // namespace krait::attention_kernels
