#include "ffi/contexts.h"

#include <pthread.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <tvm/ffi/extra/c_env_api.h>
#ifdef KRAIT_HAVE_OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "core/build.h"
#include "core/cuda/backend.h"
#include "core/thread_pool.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

// A context that is free.
struct Idle {
  Device device;
  void* stream;
  std::uint64_t recording;  // that it belongs to, or 0
  std::unique_ptr<Context> context;
};

// As many calls at one time keep their contexts for the next; further ones are made and dropped.
constexpr std::size_t kMostIdle = 16;
constexpr int kMostThreads = 4096;

struct Pool {
  std::mutex mutex;
  std::vector<Idle> idle;
  std::vector<Idle> of_recordings;
  int threads = 0;             // that somebody has asked for; 0: nobody has
  int usual_threads = 1;       // otherwise
  bool beside_openmp = false;  // operators work on OpenMP's threads

  [[nodiscard]] int chosen_threads() const { return threads > 0 ? threads : usual_threads; }
};

// A number of threads that the environment gives, or 0.
int threads_of_environment(const char* name) {
  const char* text = std::getenv(name);
  int value = 0;
  if (text != nullptr && std::from_chars(text, text + std::strlen(text), value).ec == std::errc() &&
      value > 0)
    return std::min(value, kMostThreads);
  return 0;
}

// Never destroyed: what contexts hold on a GPU cannot be given back once the process ends.
Pool& pool() {
  static Pool* const the_pool = [] {
    auto* made = new Pool;
    made->idle.reserve(kMostIdle);
    made->threads = threads_of_environment("KRAIT_NUM_THREADS");
    const int of_openmp = threads_of_environment("OMP_NUM_THREADS");
    made->usual_threads = of_openmp > 0 ? of_openmp : available_processors();
    // The threads of a context do not live on in a forked process, nor does what it holds on a GPU: there
    // idle contexts are forgotten, without an end. OpenMP does not survive either where it has run already.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] {
                     for (std::vector<Idle>* list : {&pool().idle, &pool().of_recordings}) {
                       for (Idle& entry : *list) (void)entry.context.release();
                       list->clear();
                     }
                     pool().beside_openmp = false;
                     pool().mutex.unlock();
                   });
    return made;
  }();
  return *the_pool;
}

#ifdef KRAIT_HAVE_OPENMP
constexpr bool kHaveOpenmp = true;
// That the calling thread would use for a parallel region, such as torch.set_num_threads has set it.
int openmp_threads() { return omp_get_max_threads(); }
void openmp_team(int threads, void (*work)(void*), void* data) {
#pragma omp parallel num_threads(threads)
  work(data);
}
#else
constexpr bool kHaveOpenmp = false;
int openmp_threads() { return 1; }
void openmp_team(int, void (*work)(void*), void* data) { work(data); }
#endif

// Of operators.
int threads_of(const Pool& contexts) {
  return contexts.threads == 0 && contexts.beside_openmp ? openmp_threads() : contexts.chosen_threads();
}

thread_local bool raised_by_signal = false;

// Python handles signals in the process's first thread alone. In another one there is nothing to ask for, and
// Python may be gone already.
bool handles_signals() {
#ifdef __linux__
  return ::syscall(SYS_gettid) == ::getpid();
#else
  return true;
#endif
}

// Asks the caller's environment for signals, which takes Python's lock: no more often than a person notices.
bool ended_by_signal() {
  constexpr std::chrono::milliseconds kBetween(50);
  thread_local std::chrono::steady_clock::time_point last;
  const auto now = std::chrono::steady_clock::now();
  if (now - last < kBetween) return false;
  last = now;
  if (!handles_signals()) return false;
  raised_by_signal = TVMFFIEnvCheckSignals() != 0;
  return raised_by_signal;
}

void* stream_of(Device device) {
  if (device.kind == Device::Kind::cpu) return nullptr;
  void* stream = TVMFFIEnvGetStream(kDLCUDA, device.index);
  // CUDA's legacy default stream has no handle, and one of its own (cudaStreamLegacy) where a handle is asked
  // for.
  return stream != nullptr ? stream : reinterpret_cast<void*>(1);
}

ContextOptions options_for(Device device, void* stream, int threads) {
  return {.device = device, .stream = stream, .threads = threads, .cancelled = ended_by_signal};
}

}  // namespace

ContextOptions options_for(Device device) { return options_for(device, stream_of(device), threads()); }

int checked_threads(std::int64_t threads) {
  require(threads >= 0 && threads <= kMostThreads, "threads is ", threads,
          ", expected 0 (all processors) to ", kMostThreads);
  return static_cast<int>(threads);
}

void set_threads(std::int64_t threads) {
  const int wanted = checked_threads(threads);
  const std::lock_guard lock(pool().mutex);
  pool().threads = wanted == 0 ? available_processors() : wanted;
  pool().idle.clear();
}

int threads() {
  const std::lock_guard lock(pool().mutex);
  return pool().chosen_threads();
}

bool signal_was_raised() { return std::exchange(raised_by_signal, false); }

Lease::Lease(Device device) : stream_(stream_of(device)) {
  if constexpr (kWithCuda)
    if (device.kind != Device::Kind::cpu) recording_ = cuda::recording_of(stream_);
  Pool& contexts = pool();
  int threads = 0;
  ThreadPool::Team team = nullptr;
  {
    const std::lock_guard lock(contexts.mutex);
    threads = threads_of(contexts);
    if (contexts.beside_openmp) team = openmp_team;
    std::vector<Idle>& idle = recording_ != 0 ? contexts.of_recordings : contexts.idle;
    for (auto entry = idle.rbegin(); entry != idle.rend(); ++entry) {
      if (entry->stream != stream_ || entry->device != device || entry->recording != recording_) continue;
      if (recording_ == 0 && entry->context->threads() != threads) continue;
      context_ = std::move(entry->context);
      *entry = std::move(idle.back());
      idle.pop_back();
      break;
    }
  }
  if (!context_) context_ = std::make_unique<Context>(options_for(device, stream_, threads));
  context_->workers().set_team(team);
}

Lease::~Lease() {
  Pool& contexts = pool();
  const std::lock_guard lock(contexts.mutex);
  if (recording_ != 0)
    contexts.of_recordings.push_back({context_->device(), stream_, recording_, std::move(context_)});
  else if (contexts.idle.size() < kMostIdle && context_->threads() == threads_of(contexts))
    contexts.idle.push_back({context_->device(), stream_, 0, std::move(context_)});
}

namespace {

// For callers in whose process another library computes on OpenMP's threads, as PyTorch does: loops on the
// CPU work on the same ones, and on as many, unless set_threads says how many. Nothing where this build has
// no OpenMP.
void share_openmp_threads(bool on) {
  const std::lock_guard lock(pool().mutex);
  pool().beside_openmp = on && kHaveOpenmp;
}

// Gives scratch memory that contexts keep for their next call back to the system and to the GPUs.
void release_memory() {
  Pool& contexts = pool();
  const std::lock_guard lock(contexts.mutex);
  for (const Idle& entry : contexts.idle) {
    entry.context->synchronize();
    entry.context->trim();
  }
}

}  // namespace

}  // namespace krait::ffi

KRAIT_FFI(set_num_threads, krait::ffi::set_threads)
KRAIT_FFI(get_num_threads, krait::ffi::threads)
KRAIT_FFI(share_openmp_threads, krait::ffi::share_openmp_threads)
KRAIT_FFI(release_memory, krait::ffi::release_memory)
