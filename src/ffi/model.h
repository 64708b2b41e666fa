// Models and states as callers of the C ABI hold them: objects with a count of references, which any thread
// may use and drop at any time.
#pragma once

#include <sys/types.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/object.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "ffi/convert.h"
#include "ffi/tokenizer.h"
#include "krait/core/context.h"
#include "krait/models/describe.h"
#include "krait/models/load.h"
#include "krait/models/stepper.h"

namespace krait::ffi {

// States that can run as one batch, and what steps them.
struct SharedStates {
  SharedStates(Context& ctx, const LanguageModel& model, DType dtype)
      : pool(model.make_pool(1, dtype)), stepper(ctx, model) {}

  std::shared_ptr<StatePool> pool;
  Stepper stepper;
};

// A model with the context that it works on. What works on it takes an Exclusive.
class ModelObject final : public tvm::ffi::Object {
 public:
  using Make = std::function<LanguageModel(Context&)>;

  // `files` without its tensors; their weights are what `make` returns.
  ModelObject(Device device, int threads, ModelFiles files, const Make& make);
  ~ModelObject();
  ModelObject(const ModelObject&) = delete;
  ModelObject& operator=(const ModelObject&) = delete;

  // Loaded at the first call. Throws Error(not_found) where the checkpoint has none.
  [[nodiscard]] TokenizerRef tokenizer();
  // The states of `dtype` that are alive share one pool.
  [[nodiscard]] std::shared_ptr<SharedStates> states(DType dtype);
  // Takes a state whose owner is gone. Never waits: the caller may hold a lock that work on the model wants.
  void retire(State state, std::shared_ptr<SharedStates> states) noexcept;
  // Warnings and notes since the last call.
  [[nodiscard]] std::vector<std::pair<LogLevel, std::string>> take_messages();
  void add_message(LogLevel level, std::string_view text);

  [[nodiscard]] LanguageModel& model() { return *model_; }
  [[nodiscard]] const ModelDescription& description() const { return description_; }
  [[nodiscard]] const ModelFiles& files() const { return files_; }
  [[nodiscard]] Device device() const { return device_; }

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("krait.Model", ModelObject, tvm::ffi::Object);

 private:
  friend class Exclusive;
  [[nodiscard]] bool in_forked_process() const;
  void bury() noexcept;

  const pid_t process_;
  const Device device_;
  ModelFiles files_;
  std::unique_ptr<Context> ctx_;
  std::optional<LanguageModel> model_;
  ModelDescription description_;
  std::timed_mutex in_use_;
  std::function<bool()> cancelled_;  // asked by the context while it is in use

  std::mutex tokenizer_mutex_;
  std::optional<TokenizerRef> tokenizer_;

  std::map<DType, std::weak_ptr<SharedStates>> states_;
  std::mutex retired_mutex_;
  std::vector<std::pair<std::shared_ptr<SharedStates>, State>> retired_;

  std::mutex messages_mutex_;
  std::vector<std::pair<LogLevel, std::string>> messages_;
};

class ModelRef : public tvm::ffi::ObjectRef {
 public:
  explicit ModelRef(tvm::ffi::ObjectPtr<ModelObject> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(ModelRef, tvm::ffi::ObjectRef, ModelObject);
};

// The use of a model, and of its states, by one caller. Waits for others, and throws Error(interrupted) where
// `cancelled` says so meanwhile, and Error(invalid_argument) in a forked process, which has a copy of a model
// whose threads are elsewhere.
class Exclusive {
 public:
  // Ends by signals of the caller's environment.
  explicit Exclusive(const ModelRef& model);
  Exclusive(const ModelRef& model, std::function<bool()> cancelled);
  ~Exclusive();
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

  [[nodiscard]] Context& context() const { return *model_->ctx_; }

 private:
  ModelRef model_;
};

class StateObject final : public tvm::ffi::Object {
 public:
  StateObject(ModelRef model, std::shared_ptr<SharedStates> shared);
  // A second one that goes on from where `other` is.
  explicit StateObject(const StateObject& other);
  ~StateObject();
  StateObject& operator=(const StateObject&) = delete;

  [[nodiscard]] const ModelRef& model() const { return model_; }
  [[nodiscard]] SharedStates& shared() const { return *shared_; }
  [[nodiscard]] State& state() { return *state_; }
  // Known without an Exclusive; every change of the state is followed by note_position().
  [[nodiscard]] std::int64_t position() const { return position_; }
  void note_position() { position_ = state_->position(); }

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("krait.State", StateObject, tvm::ffi::Object);

 private:
  ModelRef model_;
  std::shared_ptr<SharedStates> shared_;
  std::optional<State> state_;
  std::atomic<std::int64_t> position_{0};
};

class StateRef : public tvm::ffi::ObjectRef {
 public:
  explicit StateRef(tvm::ffi::ObjectPtr<StateObject> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(StateRef, tvm::ffi::ObjectRef, StateObject);
};

using Words = tvm::ffi::Array<Word>;
using OptionalWord = tvm::ffi::Optional<Word>;

[[nodiscard]] inline std::string text_of(const Word& word) { return {word.data(), word.size()}; }
[[nodiscard]] inline std::vector<std::string> texts_of(const Words& words) {
  std::vector<std::string> texts;
  for (const Word& word : words) texts.push_back(text_of(word));
  return texts;
}

// As a context takes them: 0 stands for what threads() says.
[[nodiscard]] int threads_of(std::int64_t threads);

// "f32", "bf16" or "f16"; absent for None.
[[nodiscard]] std::optional<DType> dtype_of(const OptionalWord& word);

// Rows of token ids: `ids` (T) i64 and `offsets` (n + 1) i64, both contiguous on the CPU. Row i is
// ids[offsets[i]] up to ids[offsets[i + 1]].
[[nodiscard]] std::vector<std::span<const std::int64_t>> rows_of(const Tensor& ids, const Tensor& offsets);

// Where models come from, beside their name.
struct SourceOptions {
  OptionalWord revision;   // of a name on the hub
  OptionalWord cache_dir;  // absent: what the environment says
  std::optional<bool> offline;
  bool progress = false;  // a bar on stderr
  std::function<bool()> cancelled;
  std::function<void(LogLevel, std::string_view)> log;
};
[[nodiscard]] hub::Options hub_options(const SourceOptions& options);
// `name` with the revision, where it is no file or directory.
[[nodiscard]] std::string with_revision(const std::string& name, const OptionalWord& revision);
[[nodiscard]] ModelFiles open_source(const std::string& name, const SourceOptions& options);

// Asks the caller's environment for signals; see contexts.h.
[[nodiscard]] std::function<bool()> by_signals();
// Asks a function that is given, no more often than a person notices, until it once has said true.
[[nodiscard]] std::function<bool()> asked(const tvm::ffi::Optional<tvm::ffi::Function>& function);

}  // namespace krait::ffi
