#include "krait/core/context.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <numeric>
#include <thread>

#include "core/parallel.h"
#include "krait/core/error.h"

namespace krait {
namespace {

TEST(Context, PoolReusesBlocks) {
  Context ctx;
  const void* first = nullptr;
  {
    const Tensor t = ctx.empty({1000});
    first = t.raw();
  }
  const std::size_t held = ctx.pool_bytes();
  const Tensor again = ctx.empty({990});
  EXPECT_EQ(again.raw(), first);
  EXPECT_EQ(ctx.pool_bytes(), held);
}

TEST(Context, TensorsOutliveTheirContext) {
  Tensor t;
  {
    Context ctx;
    t = ctx.zeros({16});
  }
  EXPECT_EQ(t.data<float>()[15], 0.0F);
}

TEST(Context, OutOfMemoryIsAnError) {
  Context ctx;
  EXPECT_THROW((void)ctx.empty({std::int64_t{1} << 59}), Error);
  EXPECT_THROW((void)ctx.empty({std::int64_t{1} << 61}, DType::f64), Error);
  EXPECT_EQ(ctx.pool_bytes(), 0U);
}

TEST(Context, RejectsWhatItCannotDo) { EXPECT_THROW(Context(ContextOptions{.threads = -1}), Error); }

TEST(Context, KnowsItsInstructionSet) { EXPECT_FALSE(simd_target().empty()); }

TEST(ParallelFor, CoversEveryIndexOnce) {
  for (const int threads : {1, 2, 5}) {
    const Context ctx(ContextOptions{.threads = threads});
    for (const std::int64_t count : {0, 1, 3, 17, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
      parallel_for(ctx, count, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
      });
      parallel_for_dynamic(ctx, count, [&](std::int64_t i) { ++seen[static_cast<std::size_t>(i)]; });
      for (const auto& n : seen) EXPECT_EQ(n, 2);
    }
  }
}

TEST(ParallelFor, LoopsWithinLoopsRunWhereTheyAre) {
  const Context ctx(ContextOptions{.threads = 3});
  std::atomic<int> calls{0};
  parallel_for(ctx, 3, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      parallel_for(ctx, 100, 1, [&](std::int64_t b, std::int64_t e) { calls += static_cast<int>(e - b); });
  });
  EXPECT_EQ(calls, 300);
}

// Many short runs, one after the other, on more threads than processors: none is lost, none runs twice, and
// no worker touches a run that has ended.
TEST(ThreadPool, ManyShortRuns) {
  const Context ctx(ContextOptions{.threads = 7});
  std::int64_t total = 0;
  for (int run = 0; run < 20000; ++run) {
    std::array<std::int64_t, 7> parts{};
    parallel_for(ctx, 7, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) parts[static_cast<std::size_t>(i)] += i + 1;
    });
    for (const std::int64_t p : parts) total += p;
  }
  EXPECT_EQ(total, 20000 * 28);
}

TEST(ThreadPool, ContextsComeAndGo) {
  for (int i = 0; i < 50; ++i) {
    const Context used(ContextOptions{.threads = 4});
    std::atomic<int> calls{0};
    parallel_for_dynamic(used, 8, [&](std::int64_t) { ++calls; });
    EXPECT_EQ(calls, 8);
    const Context unused(ContextOptions{.threads = 4});
  }
}

// A team of three: its first member is the caller, and the last comes when nothing may be left to do.
std::atomic<int> members{0};
void team_of_three(int threads, void (*work)(void*), void* data) {
  EXPECT_EQ(threads, 3);
  std::thread second([&] { work(data); });
  work(data);
  std::thread third([&] { work(data); });
  second.join();
  third.join();
  members += threads;
}

TEST(ThreadPool, WorksOnTheThreadsOfATeam) {
  const Context ctx(ContextOptions{.threads = 3});
  ctx.workers().set_team(team_of_three);
  members = 0;
  for (int run = 0; run < 200; ++run) {
    std::array<std::atomic<int>, 3> seen{};
    parallel_for(ctx, 3, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) ++seen[static_cast<std::size_t>(i)];
      parallel_for(ctx, 5, 1, [](std::int64_t, std::int64_t) {});
    });
    for (const auto& n : seen) EXPECT_EQ(n, 1);
  }
  EXPECT_EQ(members, 600) << "one team for each loop, none for loops within loops";
  parallel_for(ctx, 3, 3, [](std::int64_t, std::int64_t) {});
  EXPECT_EQ(members, 600) << "none for a single part";
  ctx.workers().set_team(nullptr);
  parallel_for(ctx, 3, 1, [](std::int64_t, std::int64_t) {});
  EXPECT_EQ(members, 600);
}

}  // namespace
}  // namespace krait
