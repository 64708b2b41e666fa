// ModelConfig: what a config.json says, upstream's (MambaConfig) and Hugging Face's alike.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "krait/modules/mamba1.h"
#include "krait/modules/mamba2.h"
#include "krait/modules/mha.h"

namespace krait {

enum class Format : std::uint8_t {
  upstream,  // state-spaces/mamba: no model_type, any hybrid of Mamba-1 or Mamba-2, attention and MLPs
  mamba,     // Hugging Face's names and fields from here on
  mamba2,
  falcon_mamba,
  gpt_neox,
};
[[nodiscard]] std::string_view name_of(Format format);

enum class SsmLayer : std::uint8_t { mamba1, mamba2 };

// GPT-NeoX (Black et al. 2022; Pythia): the Transformer that Mamba papers compare with.
struct GptNeoxConfig {
  std::int64_t num_heads = 64;
  std::int64_t intermediate_size = 24576;
  double layer_norm_eps = 1e-5;
  bool use_parallel_residual = true;
  double rotary_share = 0.25;  // of head_dim
  double rotary_base = 10000.0;
  std::string hidden_act = "gelu";  // gelu (exact), gelu_new, gelu_fast, gelu_pytorch_tanh
  bool attention_bias = true;
};

struct ModelConfig {
  Format format = Format::upstream;
  std::int64_t d_model = 2560;
  std::int64_t d_intermediate = 0;  // > 0: a gated MLP after each mixer
  std::int64_t n_layer = 64;
  std::int64_t vocab_size = 50277;
  SsmLayer ssm_layer = SsmLayer::mamba1;
  Mamba1Config mamba1;
  Mamba2Config mamba2;
  std::vector<std::int64_t> attn_layer_idx;  // layers whose mixer is attention
  MhaConfig attn;
  GptNeoxConfig gpt_neox;
  bool rms_norm = true;  // else LayerNorm
  double norm_epsilon = 1e-5;
  bool residual_in_fp32 = true;  // kept for saving: on a CPU the residual is always f32
  bool fused_add_norm = true;    // kept for saving: always fused here
  std::int64_t pad_vocab_size_multiple = 8;
  bool tie_embeddings = true;
  std::vector<std::int64_t> eos_token_ids{0};

  // Rows of embedding and head: vocab_size rounded up to pad_vocab_size_multiple.
  [[nodiscard]] std::int64_t padded_vocab_size() const;
  [[nodiscard]] bool is_attention(std::int64_t layer) const;
};

// Reads a config.json. `name` is what messages call it. Throws where it is not JSON, where a field has
// another type or range than expected, and where the architecture is unknown (the message lists the known).
ModelConfig parse_config(std::string_view json, const std::string& name);
// eos_token_id of a generation_config.json overrides that of config.json.
void apply_generation_config(ModelConfig& config, std::string_view json, const std::string& name);

}  // namespace krait
