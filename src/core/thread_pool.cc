#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>

namespace krait {
namespace {

thread_local bool in_job = false;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Some 50 microseconds: longer than the serial code between the loops of a decoding step.
constexpr int kSpins = 1500;

// Waits until `value` differs from `old`: spinning at first, then asleep.
void wait_for_change(const std::atomic<std::int32_t>& value, std::int32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

constexpr std::uint64_t kPartsMask = 0xffffffffU;

}  // namespace

bool ThreadPool::inside_job() { return in_job; }

void ThreadPool::start() {
  for (int i = 1; i < threads_; ++i) workers_.emplace_back([this] { serve(); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  runs_.fetch_add(1, std::memory_order_release);
  runs_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(std::int64_t parts, void (*job)(void*, std::int64_t), void* data) {
  if (parts <= 0) return;
  const bool own = team_ == nullptr;
  if (own && workers_.empty() && threads_ > 1) start();
  job_ = job;
  data_ = data;
  unfinished_.store(static_cast<std::int32_t>(parts), std::memory_order_relaxed);
  const std::uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(number << 32 | static_cast<std::uint64_t>(parts), std::memory_order_release);
  if (!own && parts > 1 && threads_ > 1) {
    // All of them, however few the parts: a team that changes its size ends threads and starts others.
    team_(
        threads_, [](void* pool) { static_cast<ThreadPool*>(pool)->work(); }, this);
    return;
  }
  if (own && parts > 1) {
    runs_.fetch_add(1, std::memory_order_release);
    runs_.notify_all();
  }
  work();
  for (std::int32_t left = unfinished_.load(std::memory_order_acquire); left != 0;
       left = unfinished_.load(std::memory_order_acquire))
    wait_for_change(unfinished_, left);
}

void ThreadPool::work() {
  in_job = true;
  std::uint64_t ticket = ticket_.load(std::memory_order_acquire);
  while ((ticket & kPartsMask) != 0) {
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel,
                                       std::memory_order_acquire))
      continue;
    // Until this part has ended the run cannot end, so that job_ and data_ belong to it.
    job_(data_, static_cast<std::int64_t>(ticket & kPartsMask) - 1);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_all();
    ticket = ticket_.load(std::memory_order_acquire);
  }
  in_job = false;
}

void ThreadPool::serve() {
  std::int32_t seen = 0;
  while (true) {
    wait_for_change(runs_, seen);
    if (stop_) return;
    seen = runs_.load(std::memory_order_acquire);
    work();
  }
}

int available_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace krait
