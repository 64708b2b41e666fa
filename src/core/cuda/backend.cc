#include "core/cuda/backend.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/cuda/copy.h"
#include "core/cuda/gpu.h"
#include "krait/core/error.h"

namespace krait::cuda {
namespace {

#ifdef __HIP_PLATFORM_AMD__
constexpr std::string_view kPlatform = "HIP";
constexpr std::string_view kVendor = "AMD";

std::string version_text(int version) { return concat(version / 10'000'000, '.', version / 100'000 % 100); }

// What kernels are compiled for, without the features that follow it: "gfx90a:sramecc+:xnack-".
std::string architecture_text(const cudaDeviceProp& properties) {
  const std::string name = properties.gcnArchName;
  const std::string architecture = name.substr(0, name.find(':'));
  return concat(architecture, "); build with KRAIT_HIP_ARCHITECTURES=", architecture);
}

int compute_capability_of(const cudaDeviceProp& /*properties*/) { return 0; }
#else
constexpr std::string_view kPlatform = "CUDA";
constexpr std::string_view kVendor = "NVIDIA";

std::string version_text(int version) { return concat(version / 1000, '.', version % 1000 / 10); }

std::string architecture_text(const cudaDeviceProp& properties) {
  return concat("compute capability ", properties.major, '.', properties.minor,
                "); build with KRAIT_CUDA_ARCHITECTURES=", properties.major, properties.minor);
}

int compute_capability_of(const cudaDeviceProp& properties) {
  return properties.major * 10 + properties.minor;
}
#endif

// What went wrong, in words that say what to do about it.
[[noreturn]] void fail_with(cudaError_t status, std::string_view what) {
  switch (status) {
    case cudaErrorMemoryAllocation: fail(ErrorKind::out_of_memory, what, ": out of memory on the GPU");
    case cudaErrorNoDevice:
      fail(ErrorKind::invalid_argument, what, ": this machine has no ", kPlatform, " device");
    case cudaErrorInsufficientDriver: {
      int driver = 0;
      int runtime = 0;
      (void)cudaDriverGetVersion(&driver);
      (void)cudaRuntimeGetVersion(&runtime);
      if (driver == 0)
        fail(ErrorKind::invalid_argument, what, ": this machine has no ", kVendor,
             " driver, expected one for ", kPlatform, ' ', version_text(runtime));
      fail(ErrorKind::invalid_argument, what, ": the ", kVendor, " driver serves ", kPlatform, ' ',
           version_text(driver), ", expected at least ", version_text(runtime));
    }
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: {
      int device = 0;
      cudaDeviceProp properties{};
      (void)cudaGetDevice(&device);
      (void)cudaGetDeviceProperties(&properties, device);
      fail(ErrorKind::invalid_argument, what, ": this build has no kernels for ", properties.name, " (",
           architecture_text(properties));
    }
    default: fail(ErrorKind::io, what, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ')');
  }
}

// While one lives, a graph that is recorded on another stream, or on this one, forbids this thread nothing:
// memory that is taken or given back is no part of what is recorded.
class OutsideRecordings {
 public:
  OutsideRecordings() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideRecordings() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideRecordings(const OutsideRecordings&) = delete;
  OutsideRecordings& operator=(const OutsideRecordings&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

void* allocate(std::size_t bytes, int device) {
  const DeviceGuard guard(device);
  const OutsideRecordings outside;
  void* block = nullptr;
  const cudaError_t status = cudaMalloc(&block, bytes);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    return nullptr;
  }
  check(status, "GPU memory");
  return block;
}

void release(void* block, int device) {
  // Errors of work that ran before, or of a process that ends, are not this block's.
  int previous = 0;
  (void)cudaGetDevice(&previous);
  (void)cudaSetDevice(device);
  const OutsideRecordings outside;
  (void)cudaFree(block);
  (void)cudaSetDevice(previous);
}

class Backend final : public DeviceBackend {
 public:
  Backend(int index, void* stream) : index_(index), stream_(static_cast<cudaStream_t>(stream)) {
    int count = 0;
    check(cudaGetDeviceCount(&count), concat("device cuda:", index));
    require(index >= 0 && index < count, "device cuda:", index, ": this machine has ", count, ' ', kPlatform,
            " device(s), cuda:0 to cuda:", count - 1);
    const DeviceGuard guard(index);
    if (stream_ == nullptr) {
      check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), concat("device cuda:", index));
      owned_ = true;
    }
  }
  ~Backend() override {
    if (owned_) (void)cudaStreamDestroy(stream_);
  }
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  [[nodiscard]] MemorySource memory() const override {
    return {.allocate = &allocate, .release = &release, .device = index_};
  }

  [[nodiscard]] std::string describe() const override {
    const DeviceGuard guard(index_);
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, index_), "device");
    std::size_t free = 0;
    std::size_t total = 0;
    check(cudaMemGetInfo(&free, &total), "device");
    const auto gigabytes = [](std::size_t bytes) {
      return std::round(static_cast<double>(bytes) / 1e8) / 10.0;
    };
    return concat(properties.name, ", ", gigabytes(total), " GB of which ", gigabytes(free), " GB are free");
  }

  [[nodiscard]] void* stream() const override { return stream_; }

  void synchronize() override {
    const DeviceGuard guard(index_);
    check(cudaStreamSynchronize(stream_), concat("device cuda:", index_));
  }

  void copy(const Tensor& from, const Tensor& to) override {
    const DeviceGuard guard(index_);
    if (profiles_) begin_kernel("copy");
    queued(/*kernel=*/false);
    copy_elements(stream_, from, to);
    if (profiles_) end_kernel();
  }

  void fill(const Tensor& t, double value) override {
    const DeviceGuard guard(index_);
    if (profiles_) begin_kernel("fill");
    queued(/*kernel=*/false);
    fill_elements(stream_, t, value);
    if (profiles_) end_kernel();
  }

  std::function<Tensor()> fetch(const Tensor& t) override {
    const DeviceGuard guard(index_);
    const std::shared_ptr<Landing> landing = land(t.nbytes());
    queued(/*kernel=*/false);
    check(cudaMemcpyAsync(landing->memory, t.raw(), t.nbytes(), cudaMemcpyDeviceToHost, stream_), "copy");
    check(cudaEventRecord(landing->arrived, stream_), "copy");
    return [landing, shape = t.shape(), dtype = t.dtype()] {
      check(cudaEventSynchronize(landing->arrived), "copy");
      return Tensor::wrap(landing->memory, shape, dtype).clone();
    };
  }

  void begin_kernel(std::string_view name) override {
    const DeviceGuard guard(index_);
    profiles_ = true;
    Measured& m = measured_.emplace_back(name);
    check(cudaEventCreate(&m.begin), name);
    check(cudaEventCreate(&m.end), name);
    check(cudaEventRecord(m.begin, stream_), name);
  }
  void end_kernel() override {
    const DeviceGuard guard(index_);
    (void)cudaEventRecord(measured_.back().end, stream_);
  }
  std::vector<KernelTime> take_profile() override {
    synchronize();
    std::map<std::string, KernelTime> sums;
    for (const Measured& m : measured_) {
      float milliseconds = 0.0F;
      check(cudaEventElapsedTime(&milliseconds, m.begin, m.end), m.name);
      KernelTime& sum = sums[m.name];
      ++sum.count;
      sum.seconds += 1e-3 * static_cast<double>(milliseconds);
      (void)cudaEventDestroy(m.begin);
      (void)cudaEventDestroy(m.end);
    }
    measured_.clear();
    std::vector<KernelTime> times;
    for (auto& [name, sum] : sums) {
      sum.name = name;
      times.push_back(std::move(sum));
    }
    std::sort(times.begin(), times.end(), [](const auto& a, const auto& b) { return a.seconds > b.seconds; });
    return times;
  }

  std::function<void()> record(const std::function<void()>& work) override {
    const DeviceGuard guard(index_);
    queued(/*kernel=*/false);
    // Relaxed: the graph's pool may get memory meanwhile.
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed), "graph");
    cudaGraph_t graph = nullptr;
    try {
      work();
    } catch (...) {
      (void)cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) (void)cudaGraphDestroy(graph);
      (void)cudaGetLastError();
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "graph");
    cudaGraphExec_t executable = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
    (void)cudaGraphDestroy(graph);
    check(status, "graph");
    const std::shared_ptr<std::remove_pointer_t<cudaGraphExec_t>> owned(
        executable, [](cudaGraphExec_t e) { (void)cudaGraphExecDestroy(e); });
    return [owned, stream = stream_, index = index_] {
      const DeviceGuard inner(index);
      check(cudaGraphLaunch(owned.get(), stream), "graph");
    };
  }

 private:
  // Memory of the host that the device writes to by itself.
  struct Landing {
    explicit Landing(std::size_t size) : bytes(size) {
      check(cudaMallocHost(&memory, bytes), "memory of the host");
      check(cudaEventCreateWithFlags(&arrived, cudaEventDisableTiming), "copy");
    }
    ~Landing() {
      (void)cudaFreeHost(memory);
      if (arrived != nullptr) (void)cudaEventDestroy(arrived);
    }
    Landing(const Landing&) = delete;
    Landing& operator=(const Landing&) = delete;
    std::size_t bytes;
    void* memory = nullptr;
    cudaEvent_t arrived = nullptr;
  };
  // One that nobody waits for: making one takes longer than a step.
  std::shared_ptr<Landing> land(std::size_t bytes) {
    for (const auto& landing : landings_)
      if (landing.use_count() == 1 && landing->bytes >= bytes) return landing;
    return landings_.emplace_back(std::make_shared<Landing>(std::max<std::size_t>(bytes, 256)));
  }

  struct Measured {
    explicit Measured(std::string_view n) : name(n) {}
    std::string name;
    cudaEvent_t begin = nullptr;
    cudaEvent_t end = nullptr;
  };

  int index_;
  std::vector<Measured> measured_;
  std::vector<std::shared_ptr<Landing>> landings_;
  bool profiles_ = false;  // its user measures kernels, so copies are measured too
  cudaStream_t stream_;
  bool owned_ = false;
};

}  // namespace

void check(cudaError_t status, std::string_view what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call would report it again
  fail_with(status, what);
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&previous_), "device");
  if (previous_ == device) return;
  check(cudaSetDevice(device), "device");
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) (void)cudaSetDevice(previous_);
}

const DeviceLimits& limits_of(const Context& ctx) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;  // properties of hardware, the same for every context
  const std::lock_guard lock(mutex);
  const int device = ctx.device().index;
  const auto [at, added] = known.try_emplace(device);
  if (added) {
    const auto value = [&](cudaDeviceAttr attribute) {
      int v = 0;
      check(cudaDeviceGetAttribute(&v, attribute, device), "device");
      return v;
    };
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "device");
    at->second = {.multiprocessors = value(cudaDevAttrMultiProcessorCount),
                  .shared_memory_per_block = value(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                  .l2_bytes = value(cudaDevAttrL2CacheSize),
                  .compute_capability = compute_capability_of(properties)};
  }
  return at->second;
}

bool has_warpgroup_products(const Context& ctx) {
#ifdef KRAIT_WITH_WGMMA
  return limits_of(ctx).compute_capability == 90;
#else
  static_cast<void>(ctx);
  return false;
#endif
}

std::shared_ptr<DeviceBackend> make_backend(int index, void* stream) {
  return std::make_shared<Backend>(index, stream);
}

std::uint64_t recording_of(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
#if defined(__HIP_PLATFORM_AMD__) || CUDART_VERSION < 13000
  const cudaError_t failed = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id);
#else
  const cudaError_t failed = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id,
                                                      nullptr, nullptr, nullptr, nullptr);
#endif
  // The default stream says so where another one is recorded.
  if (failed != cudaSuccess) (void)cudaGetLastError();
  return failed == cudaSuccess && status == cudaStreamCaptureStatusActive ? id : 0;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace krait::cuda
