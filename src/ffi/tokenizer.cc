// Tokenizers (krait/tokenizer/*.h).
#include "ffi/tokenizer.h"

#include <tvm/ffi/container/shape.h>

#include <filesystem>
#include <mutex>
#include <numeric>

#include "core/parallel.h"
#include "ffi/contexts.h"
#include "ffi/model.h"
#include "krait/core/error.h"
#include "krait/io/mapped_file.h"
#include "krait/tokenizer/train.h"
#include "krait/train/dataset.h"

namespace krait::ffi {
namespace {

namespace fs = std::filesystem;

TokenizerRef make_tokenizer(std::string json, const std::string& name) {
  return TokenizerRef(tvm::ffi::make_object<TokenizerObject>(std::move(json), name));
}

TokenizerRef from_file(const fs::path& path) { return make_tokenizer(io::read_file(path), path.string()); }

TokenizerRef tokenizer_from_file(const Word& path) { return from_file(text_of(path)); }
TokenizerRef tokenizer_from_json(const Word& json, const Word& name) {
  return make_tokenizer(text_of(json), text_of(name));
}

// That of the bundled model (no name), "gpt-neox", a file, a directory with tokenizer.json (or a checkpoint
// that has GPT-NeoX's vocabulary), or a name on the hub.
TokenizerRef tokenizer_load(const OptionalWord& name, const OptionalWord& revision,
                            const OptionalWord& cache_dir, const tvm::ffi::Optional<bool>& offline,
                            bool progress) {
  if (!name.has_value()) return make_tokenizer(tokenizer_json_of(open_bundled_model()), "bundled model");
  const std::string wanted = text_of(*name);
  require(!wanted.empty(),
          "the tokenizer's name is empty, expected a file, a directory or organisation/name");
  std::error_code ignored;
  const bool exists = fs::exists(wanted, ignored);
  if (!exists && wanted == "gpt-neox")
    return make_tokenizer(std::string(gpt_neox_tokenizer_json()), "bundled GPT-NeoX tokenizer");
  if (exists && !fs::is_directory(wanted)) return from_file(wanted);
  const auto in_directory = [](const fs::path& directory, const std::string& called) {
    if (fs::exists(directory / "tokenizer.json")) return from_file(directory / "tokenizer.json");
    ModelFiles files{.name = called};
    if (fs::exists(directory / "config.json")) files.config_json = io::read_file(directory / "config.json");
    if (files.config_json.empty())
      fail(ErrorKind::not_found, called, ": no tokenizer.json, expected a directory that holds one");
    std::string json = tokenizer_json_of(files);
    if (json.empty()) (void)load_tokenizer(files);  // says what is missing
    return make_tokenizer(std::move(json), called);
  };
  if (exists) return in_directory(wanted, wanted);

  const std::string full = with_revision(wanted, revision);
  const auto id = hub::parse_model_id(full);
  if (!id)
    fail(ErrorKind::not_found, full,
         ": no such file or directory, nor a model of the hub (organisation/name[@revision])");
  hub::Options options =
      hub_options({.revision = revision,
                   .cache_dir = cache_dir,
                   .offline = offline.has_value() ? std::optional<bool>(*offline) : std::nullopt,
                   .progress = progress,
                   .cancelled = by_signals()});
  // A checkpoint that is there already may have no tokenizer.json and need none.
  if (const auto cached = hub::find_cached(*id, options)) return in_directory(*cached, full);
  options.parts = hub::Parts::tokenizer;
  return in_directory(hub::download(*id, options), full);
}

tvm::ffi::Shape shape_of(const std::vector<std::int64_t>& ids) {
  return tvm::ffi::Shape(ids.begin(), ids.end());
}

tvm::ffi::Shape tokenizer_encode(const TokenizerRef& tokenizer, const Word& text, bool add_special_tokens) {
  return shape_of(tokenizer->tokenizer.encode(std::string_view(text.data(), text.size()),
                                              {.add_special_tokens = add_special_tokens}));
}

// On all threads.
tvm::ffi::Array<tvm::ffi::Shape> tokenizer_encode_batch(const TokenizerRef& tokenizer, const Words& texts,
                                                        bool add_special_tokens) {
  const std::vector<Word> all(texts.begin(), texts.end());
  std::vector<std::vector<std::int64_t>> ids(all.size());
  std::mutex mutex;
  std::exception_ptr error;
  const Lease ctx(Device{});
  parallel_for_dynamic(*ctx, static_cast<std::int64_t>(all.size()), [&](std::int64_t index) {
    const auto i = static_cast<std::size_t>(index);
    try {
      ids[i] = tokenizer->tokenizer.encode(std::string_view(all[i].data(), all[i].size()),
                                           {.add_special_tokens = add_special_tokens});
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
  tvm::ffi::Array<tvm::ffi::Shape> rows;
  for (const auto& row : ids) rows.push_back(shape_of(row));
  return rows;
}

// ids (n) i64, contiguous on the CPU.
std::span<const std::int64_t> ids_of(const Tensor& ids) {
  require(ids && ids.ndim() == 1 && ids.dtype() == DType::i64 && ids.is_contiguous(),
          "ids: expected a contiguous tensor (n) of i64 on the CPU");
  return ids.span<std::int64_t>();
}

Word tokenizer_decode(const TokenizerRef& tokenizer, const Given& ids, bool skip_special_tokens) {
  Operands of("decode");
  const Tensor held = of("ids", ids);
  return tokenizer->tokenizer.decode(ids_of(held), skip_special_tokens);
}

std::int64_t tokenizer_vocab_size(const TokenizerRef& tokenizer) { return tokenizer->tokenizer.vocab_size(); }

// -1 where there is none.
std::int64_t tokenizer_token_to_id(const TokenizerRef& tokenizer, const Word& token) {
  return tokenizer->tokenizer.token_to_id(text_of(token)).value_or(-1);
}
Word tokenizer_id_to_token(const TokenizerRef& tokenizer, std::int64_t id) {
  return std::string(tokenizer->tokenizer.id_to_token(id));
}
bool tokenizer_is_special(const TokenizerRef& tokenizer, std::int64_t id) {
  return tokenizer->tokenizer.is_special(id);
}
// -1 where there is none.
std::int64_t tokenizer_end_of_text(const TokenizerRef& tokenizer) {
  return end_of_text(tokenizer->tokenizer).value_or(-1);
}
tvm::ffi::Shape tokenizer_special_ids(const TokenizerRef& tokenizer) {
  std::vector<std::int64_t> ids;
  for (std::int64_t id = 0; id < tokenizer->tokenizer.vocab_size(); ++id)
    if (tokenizer->tokenizer.is_special(id)) ids.push_back(id);
  return shape_of(ids);
}
Word tokenizer_json(const TokenizerRef& tokenizer) { return tokenizer->json; }

class DecoderObject final : public tvm::ffi::Object {
 public:
  DecoderObject(const Tokenizer& tokenizer, bool skip_special) : decoder_(tokenizer, skip_special) {}

  std::string push(std::int64_t id) {
    const std::lock_guard lock(mutex_);
    return decoder_.push(id);
  }
  std::string finish() {
    const std::lock_guard lock(mutex_);
    return decoder_.finish();
  }

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("krait.StreamDecoder", DecoderObject, tvm::ffi::Object);

 private:
  std::mutex mutex_;
  StreamDecoder decoder_;
};

class DecoderRef : public tvm::ffi::ObjectRef {
 public:
  explicit DecoderRef(tvm::ffi::ObjectPtr<DecoderObject> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(DecoderRef, tvm::ffi::ObjectRef, DecoderObject);
};

DecoderRef decoder_new(const TokenizerRef& tokenizer, bool skip_special_tokens) {
  return DecoderRef(tvm::ffi::make_object<DecoderObject>(tokenizer->tokenizer, skip_special_tokens));
}
Word decoder_push(const DecoderRef& decoder, std::int64_t id) { return decoder->push(id); }
Word decoder_finish(const DecoderRef& decoder) { return decoder->finish(); }

// `progress` is told bytes that are done and bytes of all texts; `stop` is asked now and then, and true ends
// the work with Error(interrupted).
TokenizerRef tokenizer_train(const Words& texts, std::int64_t vocab_size, const Words& special_tokens,
                             std::int64_t min_frequency, std::int64_t threads,
                             const tvm::ffi::Optional<tvm::ffi::Function>& progress,
                             const tvm::ffi::Optional<tvm::ffi::Function>& stop,
                             const tvm::ffi::Optional<tvm::ffi::Function>& message) {
  std::vector<fs::path> paths;
  for (const Word& text : texts) paths.emplace_back(text_of(text));
  TokenizerTrainOptions options{
      .vocab_size = vocab_size, .special_tokens = texts_of(special_tokens), .min_frequency = min_frequency};
  if (progress.has_value())
    options.progress = [&](std::uint64_t done, std::uint64_t total) {
      (*progress)(static_cast<std::int64_t>(done), static_cast<std::int64_t>(total));
    };
  Context ctx({.threads = threads_of(threads),
               .log =
                   [&](LogLevel level, std::string_view text) {
                     if (message.has_value() && level == LogLevel::warning) (*message)(std::string(text));
                   },
               .cancelled = asked(stop)});
  return make_tokenizer(train_tokenizer(ctx, paths, options).json, "trained tokenizer");
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(tokenizer_from_file, krait::ffi::tokenizer_from_file)
KRAIT_FFI(tokenizer_from_json, krait::ffi::tokenizer_from_json)
KRAIT_FFI(tokenizer_load, krait::ffi::tokenizer_load)
KRAIT_FFI(tokenizer_encode, krait::ffi::tokenizer_encode)
KRAIT_FFI(tokenizer_encode_batch, krait::ffi::tokenizer_encode_batch)
KRAIT_FFI(tokenizer_decode, krait::ffi::tokenizer_decode)
KRAIT_FFI(tokenizer_vocab_size, krait::ffi::tokenizer_vocab_size)
KRAIT_FFI(tokenizer_token_to_id, krait::ffi::tokenizer_token_to_id)
KRAIT_FFI(tokenizer_id_to_token, krait::ffi::tokenizer_id_to_token)
KRAIT_FFI(tokenizer_is_special, krait::ffi::tokenizer_is_special)
KRAIT_FFI(tokenizer_end_of_text, krait::ffi::tokenizer_end_of_text)
KRAIT_FFI(tokenizer_special_ids, krait::ffi::tokenizer_special_ids)
KRAIT_FFI(tokenizer_json, krait::ffi::tokenizer_json)
KRAIT_FFI(decoder_new, krait::ffi::decoder_new)
KRAIT_FFI(decoder_push, krait::ffi::decoder_push)
KRAIT_FFI(decoder_finish, krait::ffi::decoder_finish)
KRAIT_FFI(tokenizer_train, krait::ffi::tokenizer_train)
