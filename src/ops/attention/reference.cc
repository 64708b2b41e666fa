// The definition, a query at a time, in f64.
#include <cmath>
#include <vector>

#include "core/dispatch.h"
#include "ops/attention/kernels.h"

namespace krait::attention_kernels {
namespace {

double element(const Operand& o, std::int64_t position, std::int64_t head, std::int64_t channel) {
  const std::int64_t at = position * o.position_stride + head * o.head_stride + channel * o.channel_stride;
  return dispatch_float(o.dtype, "tensor", [&](auto tag) {
    return static_cast<double>(static_cast<const typename decltype(tag)::type*>(o.data)[at]);
  });
}

void store(double value, const Operand& o, std::int64_t position, std::int64_t head, std::int64_t channel) {
  const std::int64_t at = position * o.position_stride + head * o.head_stride + channel * o.channel_stride;
  dispatch_float(o.dtype, "tensor", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, double>)
      static_cast<T*>(o.data)[at] = value;
    else
      static_cast<T*>(o.data)[at] = T(static_cast<float>(value));
  });
}

}  // namespace

void reference(const Problem& p) {
  std::vector<double> weights(static_cast<std::size_t>(p.keys));
  for (std::int64_t head = 0; head < p.heads_kv * p.group; ++head) {
    const std::int64_t head_kv = head / p.group;
    for (std::int64_t query = 0; query < p.queries; ++query) {
      const auto visible = static_cast<std::size_t>(p.visible(query));
      double largest = -INFINITY;
      for (std::size_t key = 0; key < visible; ++key) {
        double dot = 0.0;
        for (std::int64_t c = 0; c < p.head_dim; ++c)
          dot += element(p.q, query, head, c) * element(p.k, static_cast<std::int64_t>(key), head_kv, c);
        weights[key] = dot * p.scale;
        largest = std::fmax(largest, weights[key]);
      }
      double total = 0.0;
      for (std::size_t key = 0; key < visible; ++key) {
        weights[key] = std::exp(weights[key] - largest);
        total += weights[key];
      }
      for (std::int64_t c = 0; c < p.head_dim_v; ++c) {
        double sum = 0.0;
        for (std::size_t key = 0; key < visible; ++key)
          sum += weights[key] * element(p.v, static_cast<std::int64_t>(key), head_kv, c);
        store(visible == 0 ? 0.0 : sum / total, p.out, query, head, c);
      }
    }
  }
}

}  // namespace krait::attention_kernels
