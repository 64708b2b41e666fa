// ModelObject, StateObject and Exclusive: who holds a model, and who may work on it.
#include <unistd.h>

#include "ffi/contexts.h"
#include "ffi/model.h"
#include "krait/core/error.h"
#include "krait/io/mapped_file.h"

namespace krait::ffi {

ModelObject::ModelObject(Device device, int threads, ModelFiles files, const Make& make)
    : process_(::getpid()), device_(device), files_(std::move(files)) {
  ctx_ = std::make_unique<Context>(
      ContextOptions{.device = device,
                     .threads = threads,
                     .log = [this](LogLevel level, std::string_view text) { add_message(level, text); },
                     .cancelled = [this] { return cancelled_ && cancelled_(); }});
  cancelled_ = by_signals();
  model_.emplace(make(*ctx_));
  description_ = describe(*model_);
  cancelled_ = nullptr;
}

ModelObject::~ModelObject() {
  // Threads that are to be joined are in the process that this one was forked from.
  if (in_forked_process()) (void)ctx_.release();
}

bool ModelObject::in_forked_process() const { return ::getpid() != process_; }

TokenizerRef ModelObject::tokenizer() {
  const std::lock_guard lock(tokenizer_mutex_);
  if (!tokenizer_) {
    std::string json = tokenizer_json_of(files_);
    if (json.empty()) (void)load_tokenizer(files_);  // says what is missing
    const std::string name = files_.tokenizer_path ? files_.tokenizer_path->string() : files_.name;
    tokenizer_.emplace(tvm::ffi::make_object<TokenizerObject>(std::move(json), name));
  }
  return *tokenizer_;
}

std::shared_ptr<SharedStates> ModelObject::states(DType dtype) {
  std::weak_ptr<SharedStates>& known = states_[dtype];
  std::shared_ptr<SharedStates> shared = known.lock();
  if (!shared) known = shared = std::make_shared<SharedStates>(*ctx_, *model_, dtype);
  return shared;
}

void ModelObject::retire(State state, std::shared_ptr<SharedStates> states) noexcept {
  {
    const std::lock_guard lock(retired_mutex_);
    retired_.emplace_back(std::move(states), std::move(state));
  }
  if (!in_forked_process() && in_use_.try_lock()) {
    bury();
    in_use_.unlock();
  }
}

// With in_use_ held. The state goes before the pool that it belongs to.
void ModelObject::bury() noexcept {
  std::vector<std::pair<std::shared_ptr<SharedStates>, State>> gone;
  const std::lock_guard lock(retired_mutex_);
  gone.swap(retired_);
}

std::vector<std::pair<LogLevel, std::string>> ModelObject::take_messages() {
  const std::lock_guard lock(messages_mutex_);
  return std::exchange(messages_, {});
}

void ModelObject::add_message(LogLevel level, std::string_view text) {
  const std::lock_guard lock(messages_mutex_);
  messages_.emplace_back(level, text);
}

std::function<bool()> by_signals() { return options_for(Device{}).cancelled; }

std::function<bool()> asked(const tvm::ffi::Optional<tvm::ffi::Function>& function) {
  if (!function.has_value()) return [] { return false; };
  static constexpr std::chrono::milliseconds kBetween(50);
  return [ask = *function, said = false, last = std::chrono::steady_clock::now()]() mutable {
    const auto now = std::chrono::steady_clock::now();
    if (said || now - last < kBetween) return said;
    last = now;
    return said = ask().cast<bool>();
  };
}

Exclusive::Exclusive(const ModelRef& model) : Exclusive(model, by_signals()) {}

Exclusive::Exclusive(const ModelRef& model, std::function<bool()> cancelled) : model_(model) {
  require(!model->in_forked_process(),
          "the model was loaded by another process, of which this one is a fork: expected a model of this "
          "process (load it here, or start processes by the method spawn)");
  constexpr std::chrono::milliseconds kPatience(50);
  while (!model->in_use_.try_lock_for(kPatience))
    if (cancelled && cancelled()) fail(ErrorKind::interrupted, "interrupted while the model was in use");
  model->bury();
  model->cancelled_ = std::move(cancelled);
}

Exclusive::~Exclusive() {
  model_->cancelled_ = nullptr;
  model_->bury();
  model_->in_use_.unlock();
}

StateObject::StateObject(ModelRef model, std::shared_ptr<SharedStates> shared, State state)
    : model_(std::move(model)), shared_(std::move(shared)), state_(std::move(state)) {
  note_position();
}

StateObject::~StateObject() { model_->retire(std::move(*state_), std::move(shared_)); }

int threads_of(std::int64_t threads) {
  const int wanted = checked_threads(threads);
  return wanted > 0 ? wanted : ffi::threads();
}

std::optional<DType> dtype_of(const OptionalWord& word) {
  if (!word.has_value()) return std::nullopt;
  const std::string name = text_of(*word);
  const std::optional<DType> dtype = parse_dtype(name);
  require(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16, "dtype is '", name,
          "', expected one of 'f32', 'bf16', 'f16'");
  return dtype;
}

std::vector<std::span<const std::int64_t>> rows_of(const Tensor& ids, const Tensor& offsets) {
  for (const auto& [name, tensor] : {NamedTensor{"ids", ids}, NamedTensor{"offsets", offsets}})
    require(tensor && tensor.ndim() == 1 && tensor.dtype() == DType::i64 && tensor.is_contiguous() &&
                tensor.device() == Device{},
            name, ": expected a contiguous tensor (n) of i64 on the CPU");
  const auto all = ids.span<std::int64_t>();
  const auto at = offsets.span<std::int64_t>();
  std::vector<std::span<const std::int64_t>> rows;
  for (std::size_t i = 0; i + 1 < at.size(); ++i) {
    require(at[i] >= 0 && at[i] <= at[i + 1] && at[i + 1] <= ids.numel(), "offsets has ", at[i], " and ",
            at[i + 1], " for ", ids.numel(), " ids, expected them to ascend within these");
    rows.push_back(all.subspan(static_cast<std::size_t>(at[i]), static_cast<std::size_t>(at[i + 1] - at[i])));
  }
  return rows;
}

}  // namespace krait::ffi
