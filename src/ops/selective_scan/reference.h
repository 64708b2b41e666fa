// What forward and backward of the reference share.
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>
#include <type_traits>

#include "core/view.h"
#include "krait/core/tensor.h"
#include "ops/scalar.h"

namespace krait::scan {

using scalar::silu;
using scalar::softplus;

// B or C for channel d (of group g), state n and token t.
template <typename S, typename State>
class Factor {
 public:
  explicit Factor(const Tensor& tensor)
      : constant_(tensor.ndim() == 2 ? tensor : Tensor()),
        variable_(tensor.ndim() == 4 ? tensor : Tensor()) {}

  State operator()(std::int64_t batch, std::int64_t g, std::int64_t d, std::int64_t n, std::int64_t t) const {
    if (constant_) return constant_(d, n);
    if constexpr (std::is_same_v<S, State>)
      return variable_(batch, g, n, t);
    else
      return {variable_(batch, g, n, 2 * t), variable_(batch, g, n, 2 * t + 1)};
  }

 private:
  View<State> constant_;
  View<S> variable_;
};

}  // namespace krait::scan
