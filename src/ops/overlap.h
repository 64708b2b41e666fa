// Whether tensors share memory: what an operator may read and write at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "krait/core/error.h"
#include "krait/core/tensor.h"

namespace krait {

// True where the two views may share an element. Views interleaved in one buffer, such as column ranges of
// one matrix, are told apart.
[[nodiscard]] inline bool may_overlap(const Tensor& a, const Tensor& b) {
  if (!a || !b || a.numel() == 0 || b.numel() == 0) return false;
  struct Span {
    std::intptr_t low;
    std::intptr_t high;        // one past the last byte
    std::intptr_t period = 0;  // the largest stride, once dimensions that continue each other are merged
    std::intptr_t width = 0;   // bytes reached within a period
  };
  const auto span_of = [](const Tensor& t) {
    struct Dim {
      std::intptr_t stride;
      std::intptr_t size;
    };
    const auto element = static_cast<std::intptr_t>(size_of(t.dtype()));
    const auto first = reinterpret_cast<std::intptr_t>(t.raw());
    Span s{.low = first, .high = first + element};
    std::vector<Dim> dims;
    for (int i = 0; i < t.ndim(); ++i) {
      const std::intptr_t stride = t.stride(i) * element;
      if (t.size(i) == 1 || stride == 0) continue;
      (stride < 0 ? s.low : s.high) += (t.size(i) - 1) * stride;
      dims.push_back({std::abs(stride), t.size(i)});
    }
    std::sort(dims.begin(), dims.end(), [](const Dim& x, const Dim& y) { return x.stride > y.stride; });
    std::size_t outer = 0;
    while (outer + 1 < dims.size() && dims[outer].stride == dims[outer + 1].stride * dims[outer + 1].size)
      ++outer;
    s.width = element;
    for (std::size_t i = outer; i < dims.size(); ++i) {
      if (i == outer)
        s.period = dims[i].stride;
      else
        s.width += (dims[i].size - 1) * dims[i].stride;
    }
    return s;
  };
  const Span sa = span_of(a);
  const Span sb = span_of(b);
  if (sa.high <= sb.low || sb.high <= sa.low) return false;
  // Both repeat with one period and touch distinct parts of it.
  const std::intptr_t period = sa.period;
  if (period == 0 || period != sb.period) return true;
  const std::intptr_t shift = ((sb.low - sa.low) % period + period) % period;  // of b inside a's period
  return shift < sa.width || shift + sb.width > period;
}

// True where both are the same view of the same memory.
[[nodiscard]] inline bool same_view(const Tensor& a, const Tensor& b) {
  return a && b && a.raw() == b.raw() && a.dtype() == b.dtype() && a.shape() == b.shape() &&
         a.strides() == b.strides();
}

// Every element of the destination `to` is at a place of its own, unlike those of an expanded tensor.
inline void require_own_elements(std::string_view op, std::string_view name, const Tensor& to) {
  if (to.numel() == 0) return;
  for (int i = 0; i < to.ndim(); ++i)
    require(to.size(i) == 1 || to.stride(i) != 0, "[", op, "] ", name, " has ", to.size(i),
            " elements at one place in dimension ", i, " (it is expanded), expected a place for each");
}

// The destination `to` overlaps `other` nowhere; with `may_be_it` it may be the very same view.
inline void require_apart(std::string_view op, std::string_view name, const Tensor& to,
                          std::string_view other_name, const Tensor& other, bool may_be_it = false) {
  require(!may_overlap(to, other) || (may_be_it && same_view(to, other)), "[", op, "] ", name, " overlaps ",
          other_name, may_be_it ? " without being the same view" : "");
}

}  // namespace krait
