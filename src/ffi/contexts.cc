#include "ffi/contexts.h"

#include <pthread.h>
#include <tvm/ffi/extra/c_env_api.h>

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
  int threads = 0;  // 0: not chosen yet
};

// Never destroyed: what contexts hold on a GPU cannot be given back once the process ends.
Pool& pool() {
  static Pool* const the_pool = [] {
    auto* made = new Pool;
    made->idle.reserve(kMostIdle);
    // The threads of a context do not live on in a forked process, nor does what it holds on a GPU: there
    // idle contexts are forgotten, without an end.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] {
                     for (std::vector<Idle>* list : {&pool().idle, &pool().of_recordings}) {
                       for (Idle& entry : *list) (void)entry.context.release();
                       list->clear();
                     }
                     pool().mutex.unlock();
                   });
    return made;
  }();
  return *the_pool;
}

// A number of threads that the environment gives, or 0.
int threads_of_environment() {
  for (const char* name : {"KRAIT_NUM_THREADS", "OMP_NUM_THREADS"}) {
    const char* text = std::getenv(name);
    int value = 0;
    if (text != nullptr && std::from_chars(text, text + std::strlen(text), value).ec == std::errc() &&
        value > 0)
      return std::min(value, kMostThreads);
  }
  return 0;
}

int chosen_threads(Pool& contexts) {
  if (contexts.threads == 0) {
    contexts.threads = threads_of_environment();
    if (contexts.threads == 0) contexts.threads = available_processors();
  }
  return contexts.threads;
}

thread_local bool raised_by_signal = false;

// Asks the caller's environment for signals, which takes Python's lock: no more often than a person notices.
bool ended_by_signal() {
  constexpr std::chrono::milliseconds kBetween(50);
  thread_local std::chrono::steady_clock::time_point last;
  const auto now = std::chrono::steady_clock::now();
  if (now - last < kBetween) return false;
  last = now;
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
  return chosen_threads(pool());
}

bool signal_was_raised() { return std::exchange(raised_by_signal, false); }

Lease::Lease(Device device) : stream_(stream_of(device)) {
  if constexpr (kWithCuda)
    if (device.kind != Device::Kind::cpu) recording_ = cuda::recording_of(stream_);
  Pool& contexts = pool();
  int threads = 0;
  {
    const std::lock_guard lock(contexts.mutex);
    std::vector<Idle>& idle = recording_ != 0 ? contexts.of_recordings : contexts.idle;
    for (auto entry = idle.rbegin(); entry != idle.rend(); ++entry) {
      if (entry->stream != stream_ || entry->device != device || entry->recording != recording_) continue;
      context_ = std::move(entry->context);
      *entry = std::move(idle.back());
      idle.pop_back();
      return;
    }
    threads = chosen_threads(contexts);
  }
  context_ = std::make_unique<Context>(options_for(device, stream_, threads));
}

Lease::~Lease() {
  Pool& contexts = pool();
  const std::lock_guard lock(contexts.mutex);
  if (recording_ != 0)
    contexts.of_recordings.push_back({context_->device(), stream_, recording_, std::move(context_)});
  else if (contexts.idle.size() < kMostIdle && context_->threads() == chosen_threads(contexts))
    contexts.idle.push_back({context_->device(), stream_, 0, std::move(context_)});
}

namespace {

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
KRAIT_FFI(release_memory, krait::ffi::release_memory)
