// Loops over the threads of a context. Work is divided by index alone, so results do not depend on the
// thread count as long as each index computes its own outputs.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/thread_pool.h"
#include "krait/core/context.h"

namespace krait {

// Calls body(begin, end) on contiguous parts of [0, count), at most one for each thread; a part has
// at least `grain` indices. `body` must not throw. A loop within a loop runs on its own thread.
template <typename Body>
void parallel_for(const Context& ctx, std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  const std::int64_t least = std::max<std::int64_t>(grain, 1);
  const std::int64_t parts = std::min<std::int64_t>(ctx.threads(), (count + least - 1) / least);
  if (parts <= 1 || ThreadPool::inside_job()) {
    body(std::int64_t{0}, count);
    return;
  }
  const auto run_part = [&](std::int64_t part) {
    const std::int64_t begin = count * part / parts;
    const std::int64_t end = count * (part + 1) / parts;
    if (begin < end) body(begin, end);
  };
  using Run = decltype(run_part);
  ctx.workers().run(
      parts, [](void* data, std::int64_t part) { (*static_cast<const Run*>(data))(part); },
      const_cast<void*>(static_cast<const void*>(&run_part)));
}

// Calls body(index) for each index, handed out one by one: for items of uneven cost.
template <typename Body>
void parallel_for_dynamic(const Context& ctx, std::int64_t count, const Body& body) {
  std::atomic<std::int64_t> next{0};
  parallel_for(ctx, std::min<std::int64_t>(ctx.threads(), count), 1, [&](std::int64_t, std::int64_t) {
    for (std::int64_t i = next++; i < count; i = next++) body(i);
  });
}

}  // namespace krait
