#include "train/source.h"

#include <string>
#include <utility>

#include "krait/core/error.h"
#include "krait/io/mapped_file.h"
#include "krait/models/load.h"

namespace krait {
namespace fs = std::filesystem;
namespace {

// --tokenizer: a file, a directory that holds one, or the bundled one by name.
std::string named_tokenizer(const std::string& name) {
  if (name == "gpt-neox") return std::string(gpt_neox_tokenizer_json());
  const fs::path path(name);
  return io::read_file(fs::is_directory(path) ? path / "tokenizer.json" : path);
}

std::optional<Tokenizer> parse_tokenizer(const std::string& json, const std::string& name,
                                         const ModelConfig& config) {
  if (json.empty()) return std::nullopt;
  Tokenizer tokenizer = Tokenizer::from_json(json, name);
  require(tokenizer.vocab_size() <= config.vocab_size, name, ": the tokenizer has ", tokenizer.vocab_size(),
          " tokens, expected at most the model's vocab_size = ", config.vocab_size);
  return tokenizer;
}

}  // namespace

Source open_source(Context& ctx, const TrainSettings& settings, const TrainOptions& options) {
  if (!settings.config.empty()) {
    CheckpointTexts texts{.config_json = io::read_file(settings.config)};
    const ModelConfig config = parse_config(texts.config_json, settings.config);
    if (!settings.tokenizer.empty()) texts.tokenizer_json = named_tokenizer(settings.tokenizer);
    auto tokenizer = parse_tokenizer(texts.tokenizer_json, settings.tokenizer, config);
    try {
      LanguageModel model(config);
      model.initialize(static_cast<std::uint64_t>(settings.seed));
      return {.texts = std::move(texts), .model = std::move(model), .tokenizer = std::move(tokenizer)};
    } catch (const Error& error) {
      fail(error.kind(), settings.config, ": ", error.what());
    }
  }
  const ModelFiles files =
      options.open_model ? options.open_model(settings.model) : open_model(settings.model);
  CheckpointTexts texts{.config_json = files.config_json,
                        .tokenizer_json = tokenizer_json_of(files),
                        .generation_config_json = files.generation_config_json};
  if (!settings.tokenizer.empty()) {
    require(texts.tokenizer_json.empty(), "tokenizer is ", settings.tokenizer, ", but the model ", files.name,
            " has one of its own, which is kept");
    texts.tokenizer_json = named_tokenizer(settings.tokenizer);
  }
  LanguageModel model = load_language_model(ctx, files, {.dtype = DType::f32});
  auto tokenizer = parse_tokenizer(
      texts.tokenizer_json, settings.tokenizer.empty() ? files.name : settings.tokenizer, model.config());
  return {.texts = std::move(texts), .model = std::move(model), .tokenizer = std::move(tokenizer)};
}

Source open_checkpoint_source(Context& ctx, const TrainSettings& settings, const fs::path& checkpoint) {
  const ModelFiles files = open_model_directory(checkpoint);
  if (!settings.config.empty() && fs::exists(settings.config))
    require(io::read_file(settings.config) == files.config_json, settings.config,
            ": is not the configuration of ", checkpoint.string(), ", from which the run would go on");
  CheckpointTexts texts{.config_json = files.config_json,
                        .tokenizer_json = files.tokenizer_path ? io::read_file(*files.tokenizer_path) : "",
                        .generation_config_json = files.generation_config_json};
  LanguageModel model = load_language_model(ctx, files, {.dtype = DType::f32});
  auto tokenizer = parse_tokenizer(texts.tokenizer_json, files.name, model.config());
  return {.texts = std::move(texts), .model = std::move(model), .tokenizer = std::move(tokenizer)};
}

}  // namespace krait
