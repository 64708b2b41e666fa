// ThreadPool: the workers of a Context. Made for decoding, where a step is a hundred parallel loops of some
// ten microseconds each:
// - Workers spin for about as long as the serial code between two loops takes, then sleep, so that an idle
//   program costs nothing and a busy machine is not kept from its work.
// - The caller takes parts like any worker. A worker that the system has not scheduled yet holds nothing up:
//   its part is done by those who are there. (An OpenMP barrier waits for every thread; on a machine shared
//   with others that made decoding ten times slower.)
// - Beside a library with threads of its own, which spin when their work is done and keep ours from the
//   processors, it can work on those threads (Team).
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace krait {

class ThreadPool {
 public:
  // `threads` counts the caller; the others are started at the first run.
  explicit ThreadPool(int threads) : threads_(threads) {}
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls job(data, part) once for each part in [0, parts), parts < 2^32, and returns when all have ended.
  // One caller at a time. `job` must not throw.
  void run(std::int64_t parts, void (*job)(void*, std::int64_t), void* data);

  // Threads that somebody else keeps: calls work(data) on at most `threads` threads, the caller among them,
  // and returns when all calls have.
  using Team = void (*)(int threads, void (*work)(void*), void* data);
  // Further runs work on the threads of `team`; null: on workers of this pool.
  void set_team(Team team) { team_ = team; }

  // True on a thread that is inside a job: loops within loops run where they are.
  [[nodiscard]] static bool inside_job();

 private:
  void start();
  void work();
  void serve();

  int threads_;
  Team team_ = nullptr;
  std::vector<std::thread> workers_;

  // Written by the caller before it publishes a ticket, read by whoever has taken a part from it.
  void (*job_)(void*, std::int64_t) = nullptr;
  void* data_ = nullptr;

  // Upper half: the number of the run; lower half: its parts that nobody has taken yet. One word, so that
  // taking a part of a run that has ended meanwhile fails.
  alignas(64) std::atomic<std::uint64_t> ticket_{0};
  alignas(64) std::atomic<std::int32_t> unfinished_{0};  // parts of the run that have not ended
  alignas(64) std::atomic<std::int32_t> runs_{0};        // what idle workers watch
  std::atomic<bool> stop_{false};
};

// Processors that this process may use.
[[nodiscard]] int available_processors();

}  // namespace krait
