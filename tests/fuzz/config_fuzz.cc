#include <cstddef>
#include <cstdint>
#include <string_view>

#include "krait/core/error.h"
#include "krait/models/language_model.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    krait::ModelConfig config = krait::parse_config(text, "config.json");
    krait::apply_generation_config(config, text, "generation_config.json");
    // Layers are alike: a few show whether the sizes fit together.
    constexpr std::int64_t kLayers = 8;
    if (config.n_layer <= kLayers) (void)krait::LanguageModel(config);
  } catch (const krait::Error&) {
  }
  return 0;
}
