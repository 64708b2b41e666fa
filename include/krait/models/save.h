// From a language model to a checkpoint's directory, in the formats that others read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "krait/models/language_model.h"

namespace krait {

enum class SaveFormat : std::uint8_t {
  krait,     // upstream's config.json and names in model.safetensors, tokenizer.json beside it. Architectures
             // that upstream does not have (GPT-NeoX, FalconMamba, other norm epsilons) keep Hugging Face's.
  upstream,  // state-spaces/mamba: config.json and pytorch_model.bin
  hf,        // Hugging Face's transformers: config.json and model.safetensors
};

// The config.json of `format`. Throws Error(invalid_argument) naming what the format cannot express.
// What is read back with parse_config gives the same model.
std::string config_json(const ModelConfig& config, SaveFormat format);

struct SaveOptions {
  SaveFormat format = SaveFormat::krait;
  std::optional<DType> dtype;       // of matrices: f32, bf16 or f16; absent: as they are. The rest is f32.
  std::string_view tokenizer_json;  // the content of a tokenizer.json; empty: none is written
};

// Writes into `directory`, which is made where it does not exist. Everything that can be refused is refused
// before anything is written; each file is written beside and renamed. Weights of another format in the
// directory (model.safetensors beside pytorch_model.bin) would shadow the new ones and are an error.
void save_language_model(LanguageModel& model, const std::filesystem::path& directory,
                         const SaveOptions& options = {});

}  // namespace krait
