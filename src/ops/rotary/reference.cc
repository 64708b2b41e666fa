#include <cmath>
#include <cstddef>

#include "core/dispatch.h"
#include "ops/rotary/kernels.h"

namespace krait::rotary_kernels {
namespace {

template <typename T>
void turn(T& first, T& second, double angle) {
  const auto a = static_cast<double>(first);
  const auto b = static_cast<double>(second);
  const double sine = std::sin(angle);
  const double cosine = std::cos(angle);
  if constexpr (std::is_same_v<T, double>) {
    first = a * cosine - b * sine;
    second = a * sine + b * cosine;
  } else {
    first = T(static_cast<float>(a * cosine - b * sine));
    second = T(static_cast<float>(a * sine + b * cosine));
  }
}

}  // namespace

void reference(const Problem& p) {
  dispatch_float(p.dtype, "[rotary] x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* x = static_cast<T*>(p.x);
    const std::int64_t pairs = p.pairs();
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      for (std::int64_t h = 0; h < p.heads; ++h) {
        T* head = x + t * p.token_stride + h * p.head_stride;
        for (std::int64_t i = 0; i < pairs; ++i) {
          const double angle =
              p.positions[static_cast<std::size_t>(t)] * p.frequencies[static_cast<std::size_t>(i)];
          const std::int64_t first = p.interleaved ? 2 * i : i;
          const std::int64_t second = p.interleaved ? 2 * i + 1 : i + pairs;
          turn(head[first * p.channel_stride], head[second * p.channel_stride], angle);
        }
      }
    }
  });
}

}  // namespace krait::rotary_kernels
