// Generation (krait/generate/generate.h), whole and as a stream.
#include "krait/generate/generate.h"

#include <tvm/ffi/any.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tuple.h>
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <thread>

#include "ffi/contexts.h"
#include "ffi/model.h"
#include "krait/core/error.h"

namespace krait::ffi {
namespace {

// Token ids, length of the prompt, log-probabilities as f32, text, and why it ended.
using SequenceTuple = tvm::ffi::Tuple<tvm::ffi::Shape, std::int64_t, tvm::ffi::Bytes, Word, Word>;
// Sequences, prompt tokens, new tokens, seconds of prefill, seconds of decoding.
using ResultTuple =
    tvm::ffi::Tuple<tvm::ffi::Array<SequenceTuple>, std::int64_t, std::int64_t, double, double>;

ResultTuple tuple_of(const GenerateResult& result) {
  tvm::ffi::Array<SequenceTuple> sequences;
  for (const Generation& g : result.sequences)
    sequences.push_back(SequenceTuple(
        tvm::ffi::Shape(g.ids.begin(), g.ids.end()), g.prompt_length,
        tvm::ffi::Bytes(reinterpret_cast<const char*>(g.logprobs.data()), g.logprobs.size() * sizeof(float)),
        g.text, std::string(name_of(g.finish))));
  return ResultTuple(sequences, result.prompt_tokens, result.new_tokens, result.prefill_seconds,
                     result.decode_seconds);
}

// What a call of generate() is given.
struct Request {
  std::vector<std::vector<std::int64_t>> prompts;
  std::optional<TokenizerRef> tokenizer;
  GenerateOptions options;

  [[nodiscard]] GenerateResult run(Context& ctx, const LanguageModel& model) const {
    return generate(ctx, model, tokenizer ? &(*tokenizer)->tokenizer : nullptr, prompts, options);
  }
  // Where it ended before it began.
  [[nodiscard]] GenerateResult nothing_made() const {
    GenerateResult result;
    for (const auto& prompt : prompts)
      result.sequences.push_back({.ids = prompt,
                                  .prompt_length = static_cast<std::int64_t>(prompt.size()),
                                  .finish = FinishReason::interrupted});
    return result;
  }
};

Request request_of(const ModelRef& model, const Given& ids, const Given& offsets, std::int64_t max_new_tokens,
                   double temperature, std::int64_t top_k, double top_p, double min_p,
                   double repetition_penalty, std::int64_t seed, const Words& stop, bool ignore_eos,
                   const Word& state_dtype) {
  Request request;
  Operands of("generate");
  for (const auto row : rows_of(of("ids", ids), of("offsets", offsets)))
    request.prompts.emplace_back(row.begin(), row.end());
  try {
    request.tokenizer = model->tokenizer();
  } catch (const Error& error) {
    // Token ids need none.
    if (error.kind() != ErrorKind::not_found) throw;
  }
  request.options = {.max_new_tokens = max_new_tokens,
                     .sampling = {.temperature = temperature,
                                  .top_k = top_k,
                                  .top_p = top_p,
                                  .min_p = min_p,
                                  .repetition_penalty = repetition_penalty},
                     .seed = static_cast<std::uint64_t>(seed),
                     .stop = texts_of(stop),
                     .ignore_eos = ignore_eos,
                     .state_dtype = dtype_of(state_dtype).value_or(DType::f32)};
  validate(request.options.sampling);
  return request;
}

ResultTuple run_generate(const ModelRef& model, const Given& ids, const Given& offsets,
                         std::int64_t max_new_tokens, double temperature, std::int64_t top_k, double top_p,
                         double min_p, double repetition_penalty, std::int64_t seed, const Words& stop,
                         bool ignore_eos, const Word& state_dtype) {
  const Request request = request_of(model, ids, offsets, max_new_tokens, temperature, top_k, top_p, min_p,
                                     repetition_penalty, seed, stop, ignore_eos, state_dtype);
  const Exclusive use(model);
  const GenerateResult result = request.run(use.context(), model->model());
  // generate() returns what there was when a signal came.
  if (signal_was_raised()) throw tvm::ffi::EnvErrorAlreadySet();
  return tuple_of(result);
}

// A generation on a thread of its own, which needs nothing of the caller: pieces of text wait here until they
// are fetched.
class StreamObject final : public tvm::ffi::Object {
 public:
  StreamObject(const ModelRef& model, Request request)
      : model_(std::move(model)), request_(std::move(request)), process_(::getpid()) {
    request_.options.on_text = [this](std::int64_t sequence, std::string_view text) {
      const std::lock_guard lock(mutex_);
      pieces_.emplace_back(sequence, text);
      changed_.notify_all();
    };
    worker_ = std::thread([this] { work(); });
  }
  ~StreamObject() { close(); }
  StreamObject(const StreamObject&) = delete;
  StreamObject& operator=(const StreamObject&) = delete;

  // The next piece, or nothing where none has come within `seconds`, or the stream is at its end.
  std::optional<std::pair<std::int64_t, std::string>> next(double seconds) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                      [this] { return done_ || !pieces_.empty(); });
    if (pieces_.empty()) return std::nullopt;
    auto piece = std::move(pieces_.front());
    pieces_.pop_front();
    return piece;
  }
  [[nodiscard]] bool ended() {
    const std::lock_guard lock(mutex_);
    return done_ && pieces_.empty();
  }
  // Ends the generation where it is, and waits for the end.
  void close() {
    if (::getpid() != process_) {
      if (worker_.joinable()) worker_.detach();  // the thread is in another process
      return;
    }
    cancelled_ = true;
    const std::lock_guard lock(joining_);
    if (worker_.joinable()) worker_.join();
  }
  // Of a stream that has ended. Throws what ended it.
  [[nodiscard]] GenerateResult result() {
    const std::lock_guard lock(mutex_);
    require(done_, "the stream has not ended yet, expected all of it to be read, or close()");
    if (error_) std::rethrow_exception(error_);
    return result_;
  }

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("krait.Stream", StreamObject, tvm::ffi::Object);

 private:
  void work() {
    GenerateResult result;
    std::exception_ptr error;
    try {
      const Exclusive use(model_, [this] { return cancelled_.load(); });
      result = request_.run(use.context(), model_->model());
    } catch (const Error& caught) {
      if (caught.kind() == ErrorKind::interrupted)
        result = request_.nothing_made();
      else
        error = std::current_exception();
    } catch (...) {
      error = std::current_exception();
    }
    const std::lock_guard lock(mutex_);
    result_ = std::move(result);
    error_ = error;
    done_ = true;
    changed_.notify_all();
  }

  ModelRef model_;
  Request request_;
  const pid_t process_;
  std::atomic<bool> cancelled_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<std::int64_t, std::string>> pieces_;
  GenerateResult result_;
  std::exception_ptr error_;
  bool done_ = false;
  std::mutex joining_;
  std::thread worker_;
};

class StreamRef : public tvm::ffi::ObjectRef {
 public:
  explicit StreamRef(tvm::ffi::ObjectPtr<StreamObject> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(StreamRef, tvm::ffi::ObjectRef, StreamObject);
};

StreamRef stream_begin(const ModelRef& model, const Given& ids, const Given& offsets,
                       std::int64_t max_new_tokens, double temperature, std::int64_t top_k, double top_p,
                       double min_p, double repetition_penalty, std::int64_t seed, const Words& stop,
                       bool ignore_eos, const Word& state_dtype) {
  (void)model->tokenizer();  // a stream is of text
  Request request = request_of(model, ids, offsets, max_new_tokens, temperature, top_k, top_p, min_p,
                               repetition_penalty, seed, stop, ignore_eos, state_dtype);
  return StreamRef(tvm::ffi::make_object<StreamObject>(model, std::move(request)));
}

// The index of a sequence and a piece of its text; -1 where none has come in time; -2 at the end.
using PieceTuple = tvm::ffi::Tuple<std::int64_t, Word>;
PieceTuple stream_next(const StreamRef& stream, double seconds) {
  if (const auto piece = stream->next(seconds)) return PieceTuple(piece->first, piece->second);
  return PieceTuple(std::int64_t{stream->ended() ? -2 : -1}, "");
}

void stream_close(const StreamRef& stream) { stream->close(); }
ResultTuple stream_result(const StreamRef& stream) { return tuple_of(stream->result()); }

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(generate, krait::ffi::run_generate)
KRAIT_FFI(stream_begin, krait::ffi::stream_begin)
KRAIT_FFI(stream_next, krait::ffi::stream_next)
KRAIT_FFI(stream_close, krait::ffi::stream_close)
KRAIT_FFI(stream_result, krait::ffi::stream_result)
