// The two backbones behind LanguageModel.
#pragma once

#include <memory>

#include "krait/models/language_model.h"

namespace krait {

std::unique_ptr<Backbone> make_mixer_model(const ModelConfig& config);
std::unique_ptr<Backbone> make_gpt_neox(const ModelConfig& config);

}  // namespace krait
