#pragma once

#include <map>
#include <string>

namespace krait::testing {

// Configurations that no fixture has: each option away from its default somewhere.
inline const std::map<std::string, std::string>& odd_configs() {
  static const std::map<std::string, std::string> kConfigs{
      {"mamba1 odd sizes", R"({"d_model": 37, "n_layer": 2, "vocab_size": 50, "tie_embeddings": false,
        "ssm_cfg": {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7, "bias": true, "conv_bias": false}})"},
      {"mamba2 groups, hdim D, no norm", R"({"d_model": 32, "n_layer": 2, "vocab_size": 50, "rms_norm": false,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "ngroups": 2, "d_state": 12, "D_has_hdim": true, "rmsnorm": false,
        "bias": true, "dt_limit": [0.01, 0.2]}})"},
      {"mamba2 d_ssm", R"({"d_model": 32, "n_layer": 2, "vocab_size": 50,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_ssm": 32, "d_state": 16, "norm_before_gate": true, "d_conv": 2}})"},
      {"hybrid with mlp", R"({"d_model": 32, "n_layer": 4, "vocab_size": 50, "d_intermediate": 48,
        "ssm_cfg": {"layer": "Mamba1"}, "attn_layer_idx": [1, 3], "attn_cfg": {"num_heads": 4, "num_heads_kv": 1,
        "head_dim": 6, "causal": true, "d_conv": 4, "rotary_emb_dim": 4, "rotary_emb_interleaved": true, "mlp_dim": 100,
        "softmax_scale": 0.3}})"},
      {"falcon",
       R"({"model_type": "falcon_mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50,
        "state_size": 4, "intermediate_size": 48, "use_bias": true})"},
      {"neox sequential",
       R"({"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50,
        "num_attention_heads": 4, "intermediate_size": 64, "use_parallel_residual": false, "hidden_act": "gelu_new",
        "rotary_pct": 0.5})"}};
  return kConfigs;
}

}  // namespace krait::testing
