// Loops over threads. Work is divided by index alone, so results do not depend on the thread count
// as long as each index computes its own outputs.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "krait/core/context.h"

namespace krait {

// Calls body(begin, end) on contiguous parts of [0, count), at most one for each thread; a part has
// at least `grain` indices. `body` must not throw.
template <typename Body>
void parallel_for(const Context& ctx, std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  const std::int64_t parts =
      std::min<std::int64_t>(ctx.threads(), (count + grain - 1) / std::max<std::int64_t>(grain, 1));
  if (parts <= 1 || omp_in_parallel() != 0) {
    body(std::int64_t{0}, count);
    return;
  }
#pragma omp parallel num_threads(static_cast <int>(parts))
  {
    const std::int64_t t = omp_get_thread_num();
    const std::int64_t n = omp_get_num_threads();
    const std::int64_t begin = count * t / n;
    const std::int64_t end = count * (t + 1) / n;
    if (begin < end) body(begin, end);
  }
}

// Calls body(index) for each index, handed out one by one: for items of uneven cost.
template <typename Body>
void parallel_for_dynamic(const Context& ctx, std::int64_t count, const Body& body) {
  if (count <= 0) return;
  if (ctx.threads() <= 1 || count == 1 || omp_in_parallel() != 0) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) \
    num_threads(static_cast <int>(std::min <std::int64_t>(ctx.threads(), count)))
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace krait
