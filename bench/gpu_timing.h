// Time on a GPU.
#pragma once

#include <algorithm>
#include <chrono>
#include <limits>

#include "krait/core/context.h"

namespace krait {

// Seconds of one of `calls` calls of `work` that are queued in a row, by the host's clock; the best of
// `rounds`.
template <typename Work>
double seconds_of_call(Context& ctx, int rounds, int calls, const Work& work) {
  double best = std::numeric_limits<double>::infinity();
  for (int round = 0; round < rounds; ++round) {
    ctx.synchronize();
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) work();
    ctx.synchronize();
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
    best = std::min(best, passed.count() / calls);
  }
  return best;
}

}  // namespace krait
