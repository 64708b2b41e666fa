// From a name or a directory to a language model and its tokenizer.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "krait/core/context.h"
#include "krait/io/hub.h"
#include "krait/io/tensor_file.h"
#include "krait/models/language_model.h"
#include "krait/tokenizer/tokenizer.h"

namespace krait {

// An opened checkpoint: its texts in memory, its weights mapped.
struct ModelFiles {
  std::string name;  // as messages call it: the directory, or "bundled model"
  std::string config_json;
  std::string generation_config_json;  // empty where there is none
  std::optional<std::filesystem::path> tokenizer_path;
  std::string_view tokenizer_json;  // of a bundled model
  io::TensorMap tensors;
};

// A directory with config.json and weights (or one weight file in it).
ModelFiles open_model_directory(const std::filesystem::path& path);
// The model inside this library: a small Mamba-2 that has read Shakespeare.
ModelFiles open_bundled_model();
// "" is the bundled model; then a directory or weight file; then a model of the hub, "org/name[@revision]",
// downloaded or from the cache.
ModelFiles open_model(const std::string& model, const hub::Options& options);
ModelFiles open_model(const std::string& model);  // with hub::options_from_environment()

// config.json with what generation_config.json overrides.
ModelConfig read_config(const ModelFiles& files);

struct LoadOptions {
  std::optional<DType> dtype;  // of matrices: f32, bf16 or f16; absent: as in the file, used in place
  bool check_finite = true;    // warn of NaN and infinity in weights (costs one reading of them)
};

// Checks that every expected tensor is there with its shape and that nothing unexpected is, then puts the
// tensors in their places. Throws Error(invalid_argument) naming file and tensor.
LanguageModel load_language_model(Context& ctx, const ModelFiles& files, const LoadOptions& options = {});

// tokenizer.json beside the weights; else GPT-NeoX's, which upstream's checkpoints were trained with and do
// not carry, where the vocabulary has its size. Throws Error(not_found) otherwise.
Tokenizer load_tokenizer(const ModelFiles& files);
// The content of the tokenizer.json that load_tokenizer would take; empty where it would find none.
std::string tokenizer_json_of(const ModelFiles& files);
// The bundled tokenizer of EleutherAI/gpt-neox-20b, as its tokenizer.json and ready for use.
std::string_view gpt_neox_tokenizer_json();
Tokenizer gpt_neox_tokenizer();

}  // namespace krait
