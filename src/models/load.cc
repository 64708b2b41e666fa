#include "krait/models/load.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <set>
#include <vector>

#include "core/parallel.h"
#include "krait/core/error.h"
#include "krait/io/mapped_file.h"
#include "krait/io/safetensors.h"
#include "models/bundled.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxConfigBytes = std::size_t{16} << 20;

std::string read_text(const fs::path& path) { return io::read_file(path, kMaxConfigBytes); }

// The names under which a parameter may stand in a file, the canonical one first.
std::vector<std::string> names_in_files(const std::string& name) {
  if (name == "backbone.embedding.weight") return {name, "backbone.embeddings.weight"};
  if (name == "embed_out.weight") return {name, "lm_head.weight"};
  return {name};
}

// Tensors that checkpoints carry beside parameters: the tied head, and buffers of old GPT-NeoX files.
bool is_known_extra(const ModelConfig& config, std::string_view name) {
  if (config.tie_embeddings && (name == "lm_head.weight" || name == "embed_out.weight")) return true;
  if (config.format != Format::gpt_neox) return false;
  return name.ends_with(".attention.bias") || name.ends_with(".attention.masked_bias") ||
         name.ends_with(".rotary_emb.inv_freq");
}

template <typename T>
bool all_finite(const T* values, std::int64_t count) {
  // An exponent of all ones is infinity or NaN. Branch-free over a stretch, so that it vectorises.
  using Bits = std::conditional_t<sizeof(T) == 2, std::uint16_t,
                                  std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>;
  constexpr Bits kExponent = std::is_same_v<T, bf16>    ? Bits{0x7f80}
                             : std::is_same_v<T, f16>   ? Bits{0x7c00}
                             : std::is_same_v<T, float> ? static_cast<Bits>(0x7f800000U)
                                                        : static_cast<Bits>(0x7ff0000000000000U);
  const auto* bits = reinterpret_cast<const Bits*>(values);
  constexpr std::int64_t kStretch = 4096;
  for (std::int64_t begin = 0; begin < count; begin += kStretch) {
    const std::int64_t end = std::min(count, begin + kStretch);
    Bits bad = 0;
    for (std::int64_t i = begin; i < end; ++i)
      bad = static_cast<Bits>(bad | static_cast<Bits>((bits[i] & kExponent) == kExponent));
    if (bad != 0) return false;
  }
  return true;
}

bool is_finite(const Context& ctx, const Tensor& t) {
  const Tensor flat = t.contiguous();
  std::atomic<bool> finite{true};
  parallel_for(ctx, flat.numel(), 1 << 16, [&](std::int64_t begin, std::int64_t end) {
    const bool ok = [&] {
      switch (flat.dtype()) {
        case DType::f32: return all_finite(flat.data<float>() + begin, end - begin);
        case DType::bf16: return all_finite(flat.data<bf16>() + begin, end - begin);
        case DType::f16: return all_finite(flat.data<f16>() + begin, end - begin);
        case DType::f64: return all_finite(flat.data<double>() + begin, end - begin);
        default: return true;
      }
    }();
    if (!ok) finite = false;
  });
  return finite;
}

// A conversion spread over threads by rows.
Tensor converted(const Context& ctx, const Tensor& t, DType dtype) {
  if (t.dtype() == dtype) return t;
  Tensor out = Tensor::empty(t.shape(), dtype);
  if (t.ndim() == 0) {
    out.copy_from(t);
    return out;
  }
  parallel_for(ctx, t.size(0),
               std::max<std::int64_t>(1, 65536 * t.size(0) / std::max<std::int64_t>(t.numel(), 1)),
               [&](std::int64_t begin, std::int64_t end) {
                 out.slice(0, begin, end).copy_from(t.slice(0, begin, end));
               });
  return out;
}

// Puts the tensors of `files` into the parameters of `model`, one by one.
class Loader {
 public:
  Loader(Context& ctx, const ModelFiles& files, const ModelConfig& config, const LoadOptions& options)
      : ctx_(ctx), files_(files), config_(config), options_(options) {}

  void place(const Parameter& p) {
    const Tensor* found = nullptr;
    for (const std::string& name : names_in_files(p.name)) {
      const auto it = files_.tensors.find(name);
      if (it == files_.tensors.end()) continue;
      used_.insert(name);
      if (found == nullptr) found = &it->second;
    }
    if (found == nullptr)
      fail(ErrorKind::invalid_argument, files_.name, ": tensor ", p.name, " is missing, expected shape ",
           p.shape);
    require(found->shape() == p.shape, files_.name, ": tensor ", p.name, " has shape ", found->shape(),
            ", expected ", p.shape);
    require(is_float(found->dtype()), files_.name, ": tensor ", p.name, " has dtype ", found->dtype(),
            ", expected f32, bf16, f16 or f64");
    if (options_.check_finite && !is_finite(ctx_, *found)) not_finite_.push_back(p.name);
    DType dtype = p.kind == ParameterKind::small ? DType::f32 : options_.dtype.value_or(found->dtype());
    if (dtype == DType::f64) dtype = DType::f32;
    p.tensor = ctx_.to_device(converted(ctx_, *found, dtype));
  }

  void finish() const {
    for (const auto& [name, tensor] : files_.tensors)
      require(used_.contains(name) || is_known_extra(config_, name), files_.name, ": unexpected tensor ",
              name, " of shape ", tensor.shape(), ": this configuration has no such parameter");
    constexpr std::size_t kNamed = 5;
    for (std::size_t i = 0; i < std::min(kNamed, not_finite_.size()); ++i)
      ctx_.warn(concat(files_.name, ": tensor ", not_finite_[i], " has values that are NaN or infinite"));
    if (not_finite_.size() > kNamed)
      ctx_.warn(concat(files_.name, ": and ", not_finite_.size() - kNamed, " more such tensors"));
  }

 private:
  Context& ctx_;
  const ModelFiles& files_;
  const ModelConfig& config_;
  const LoadOptions& options_;
  std::set<std::string, std::less<>> used_;
  std::vector<std::string> not_finite_;
};

}  // namespace

ModelFiles open_model_directory(const fs::path& path) {
  const bool is_file = fs::is_regular_file(path);
  const fs::path directory = is_file ? path.parent_path() : path;
  if (!fs::exists(path)) fail(ErrorKind::not_found, path.string(), ": no such directory");
  const fs::path config = directory / "config.json";
  if (!fs::exists(config))
    fail(ErrorKind::not_found, path.string(), ": no config.json, expected a checkpoint's directory");
  ModelFiles files;
  files.name = path.string();
  files.config_json = read_text(config);
  if (const fs::path generation = directory / "generation_config.json"; fs::exists(generation))
    files.generation_config_json = read_text(generation);
  if (const fs::path tokenizer = directory / "tokenizer.json"; fs::exists(tokenizer))
    files.tokenizer_path = tokenizer;
  files.tensors = io::read_checkpoint(path);
  return files;
}

ModelFiles open_bundled_model() {
  ModelFiles files;
  files.name = "bundled model";
  files.config_json = bundled::shakespeare_config();
  files.tokenizer_json = bundled::shakespeare_tokenizer();
  files.tensors = io::parse_safetensors(bundled::shakespeare_weights(), nullptr, files.name);
  return files;
}

ModelFiles open_model(const std::string& model, const hub::Options& options) {
  if (model.empty()) return open_bundled_model();
  std::error_code ignored;
  if (fs::exists(model, ignored)) return open_model_directory(model);
  const auto id = hub::parse_model_id(model);
  if (!id)
    fail(ErrorKind::not_found, model,
         ": no such directory, nor a model of the hub (organisation/name[@revision])");
  try {
    ModelFiles files = open_model_directory(hub::download(*id, options));
    files.name = model;
    return files;
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::not_found && e.kind() != ErrorKind::network) throw;
    fail(e.kind(), model, ": no such directory; as a model of the hub: ", e.what());
  }
}

ModelFiles open_model(const std::string& model) { return open_model(model, hub::options_from_environment()); }

ModelConfig read_config(const ModelFiles& files) {
  ModelConfig config = parse_config(files.config_json, files.name + "/config.json");
  if (!files.generation_config_json.empty())
    apply_generation_config(config, files.generation_config_json, files.name + "/generation_config.json");
  return config;
}

namespace {

// Sizes that do not fit together are found by the module that they belong to; the message says whose they
// are.
LanguageModel make_model(const ModelFiles& files) {
  const ModelConfig config = read_config(files);
  try {
    return LanguageModel(config);
  } catch (const Error& e) {
    fail(e.kind(), files.name, "/config.json: ", e.what());
  }
}

}  // namespace

LanguageModel load_language_model(Context& ctx, const ModelFiles& files, const LoadOptions& options) {
  require(!options.dtype || *options.dtype == DType::f32 || *options.dtype == DType::bf16 ||
              *options.dtype == DType::f16,
          "dtype is ", options.dtype.value_or(DType::f32), ", expected f32, bf16 or f16");
  io::prefetch(files.tensors);
  LanguageModel model = make_model(files);
  const ModelConfig& config = model.config();
  if (!config.attn_layer_idx.empty() && !config.attn.causal)
    ctx.warn(concat(files.name,
                    ": attention layers look ahead (attn_cfg: causal is not true): logits of a token "
                    "depend on the tokens after it"));
  Loader loader(ctx, files, model.config(), options);
  model.visit([&](const Parameter& p) { loader.place(p); });
  loader.finish();
  model.to_device(ctx);
  return model;
}

std::string_view gpt_neox_tokenizer_json() { return bundled::gpt_neox_tokenizer(); }

Tokenizer gpt_neox_tokenizer() {
  return Tokenizer::from_json(gpt_neox_tokenizer_json(), "bundled GPT-NeoX tokenizer");
}

namespace {

// 50,277 tokens, which checkpoints pad to 50,280 or 50,288, or to multiples of 128 in Pythia.
constexpr std::int64_t kNeoxTokens = 50277;
constexpr std::int64_t kNeoxPadded = 50432;

bool has_gpt_neox_vocabulary(std::int64_t vocab_size) {
  return vocab_size >= kNeoxTokens - 23 && vocab_size <= kNeoxPadded;
}

}  // namespace

Tokenizer load_tokenizer(const ModelFiles& files) {
  if (files.tokenizer_path) return Tokenizer::from_file(*files.tokenizer_path);
  if (!files.tokenizer_json.empty()) return Tokenizer::from_json(files.tokenizer_json, files.name);
  const std::int64_t vocab_size = read_config(files).vocab_size;
  if (!has_gpt_neox_vocabulary(vocab_size))
    fail(ErrorKind::not_found, files.name, ": no tokenizer.json, and the vocabulary of ", vocab_size,
         " is not that of the bundled GPT-NeoX tokenizer (", std::int64_t{kNeoxTokens}, ")");
  return gpt_neox_tokenizer();
}

std::string tokenizer_json_of(const ModelFiles& files) {
  if (files.tokenizer_path) return read_text(*files.tokenizer_path);
  if (!files.tokenizer_json.empty()) return std::string(files.tokenizer_json);
  if (has_gpt_neox_vocabulary(read_config(files).vocab_size)) return std::string(gpt_neox_tokenizer_json());
  return {};
}

}  // namespace krait
