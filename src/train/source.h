// What a run starts from: a model, with or without weights, and its tokenizer, as texts that the run's
// directory gets copies of.
#pragma once

#include <filesystem>
#include <optional>

#include "krait/core/context.h"
#include "krait/models/language_model.h"
#include "krait/tokenizer/tokenizer.h"
#include "krait/train/settings.h"
#include "krait/train/train.h"
#include "train/checkpoint.h"

namespace krait {

struct Source {
  CheckpointTexts texts;
  LanguageModel model;  // f32 weights
  std::optional<Tokenizer> tokenizer;
};

// From settings.model or settings.config. Throws where the tokenizer has more tokens than the model.
Source open_source(Context& ctx, const TrainSettings& settings, const TrainOptions& options);
// From the directory of a checkpoint.
Source open_checkpoint_source(Context& ctx, const TrainSettings& settings,
                              const std::filesystem::path& checkpoint);

}  // namespace krait
