// What a model consists of, for people and for programs.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "krait/models/language_model.h"

namespace krait {

struct ModelDescription {
  std::string format;        // "mamba_ssm", "mamba", "mamba2", "falcon_mamba", "gpt_neox"
  std::string architecture;  // "24 x Mamba1", "58 x Mamba2, 6 x MHA", ...
  std::int64_t d_model = 0;
  std::int64_t n_layer = 0;
  std::int64_t vocab_size = 0;
  std::int64_t padded_vocab_size = 0;
  bool tied_embeddings = false;
  std::int64_t parameters = 0;
  std::map<std::string, std::int64_t> parameters_by_part;  // embedding, mixers, mlps, norms, head
  std::map<std::string, std::int64_t> bytes_by_dtype;
  std::int64_t weight_bytes = 0;
  std::int64_t state_bytes_per_sequence = 0;  // fixed: conv windows and SSM states
  std::int64_t state_bytes_per_token = 0;     // keys and values of attention layers
};

ModelDescription describe(LanguageModel& model);

}  // namespace krait
