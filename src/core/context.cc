#include "krait/core/context.h"

#include <charconv>
#include <utility>

#include "core/device_backend.h"
#include "core/memory_pool.h"
#include "core/thread_pool.h"
#include "krait/core/error.h"

namespace krait {

Context::Context(ContextOptions options) : options_(std::move(options)) {
  require(options_.threads >= 0 && options_.threads <= 4096, "threads is ", options_.threads,
          ", expected 0 (all processors) to 4096");
  if (options_.threads == 0) options_.threads = available_processors();
  workers_ = std::make_unique<ThreadPool>(options_.threads);
  if (on_gpu()) {
    require(!options_.reference, "device ", name_of(options_.device),
            ": the reference paths run on the CPU, expected device cpu");
    memory_.device_ = options_.device;
    memory_.backend_ = make_cuda_backend(options_.device.index, options_.stream);
  }
  memory_.pool_ = std::make_shared<MemoryPool>(on_gpu() ? memory_.backend_->memory() : host_memory());
}

Context::~Context() = default;

void Context::log(LogLevel level, std::string_view message) const {
  if (options_.log) options_.log(level, message);
}

void Context::check_cancelled() const {
  if (options_.cancelled && options_.cancelled()) fail(ErrorKind::interrupted, "interrupted");
}

void* Context::stream() const { return on_gpu() ? memory_.backend_->stream() : nullptr; }

void Context::synchronize() const {
  if (on_gpu()) memory_.backend_->synchronize();
}

std::vector<KernelTime> Context::profile() const {
  return profiling() ? memory_.backend_->take_profile() : std::vector<KernelTime>();
}

std::function<Tensor()> Context::fetch(const Tensor& t) const {
  if (t.device().kind == Device::Kind::cpu) return [copy = t.clone()] { return copy; };
  return memory_.backend_->fetch(memory_.contiguous(t));
}

std::function<void()> Context::record(const std::function<void()>& work) {
  require(on_gpu(), "only work on a GPU can be recorded, not on ", name_of(device()));
  require(!profiling(), "work that is profiled kernel by kernel cannot be recorded");
  // A pool for the graph alone: its addresses are in the graph, and nothing else may be given them.
  const auto outside = memory_.pool_;
  memory_.pool_ = std::make_shared<MemoryPool>(memory_.backend_->memory());
  const auto own = memory_.pool_;
  try {
    auto launch = memory_.backend_->record(work);
    memory_.pool_ = outside;
    return [launch = std::move(launch), own] { launch(); };
  } catch (...) {
    memory_.pool_ = outside;
    throw;
  }
}

OverlappingKernels::OverlappingKernels(Context& ctx)
    : backend_(ctx.on_gpu() && !ctx.device_backend()->overlapping() ? ctx.device_backend() : nullptr) {
  if (backend_ != nullptr) backend_->set_overlapping(true);
}

OverlappingKernels::~OverlappingKernels() {
  if (backend_ != nullptr) backend_->set_overlapping(false);
}

std::size_t Context::pool_bytes() const { return memory_.pool_->held(); }
void Context::trim() { memory_.pool_->trim(); }

std::shared_ptr<void>& Context::attachment(const void* key) { return attachments_[key]; }

void Context::set_backend(std::string_view op, std::string_view path) {
  backend_.assign(op).append(": ").append(path);
}

Device parse_device(std::string_view name) {
  if (name == "cpu") return {};
  if (name == "auto") return cuda_device_count() > 0 ? Device{Device::Kind::cuda, 0} : Device{};
  if (name == "cuda") return {Device::Kind::cuda, 0};
  int index = -1;
  if (name.starts_with("cuda:")) {
    const char* end = name.data() + name.size();
    const auto [at, error] = std::from_chars(name.data() + 5, end, index);
    if (error != std::errc() || at != end) index = -1;
  }
  require(index >= 0, "device is '", name, "', expected cpu, cuda, cuda:N or auto");
  return {Device::Kind::cuda, index};
}

void require_on_device(const Context& ctx, std::string_view op, std::initializer_list<NamedTensor> tensors) {
  for (const auto& [name, tensor] : tensors)
    require(!tensor || tensor.device() == ctx.device(), "[", op, "] ", name, " is on ",
            name_of(tensor.device()), ", expected ", name_of(ctx.device()));
}

}  // namespace krait
