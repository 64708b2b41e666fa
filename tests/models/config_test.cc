#include "krait/models/config.h"

#include <gtest/gtest.h>

#include <cmath>

#include "krait/core/error.h"

namespace krait {
namespace {

std::string message_of(std::string_view json) {
  try {
    (void)parse_config(json, "config.json");
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Config, UpstreamDefaultsOfOlderFiles) {
  const ModelConfig c =
      parse_config(R"({"d_model": 768, "n_layer": 24, "vocab_size": 50277})", "config.json");
  EXPECT_EQ(c.format, Format::upstream);
  EXPECT_EQ(c.ssm_layer, SsmLayer::mamba1);
  EXPECT_EQ(c.padded_vocab_size(), 50280);
  EXPECT_TRUE(c.tie_embeddings && c.rms_norm);
  EXPECT_EQ(c.eos_token_ids, std::vector<std::int64_t>{0});
}

TEST(Config, UpstreamMambaTwoWithAttention) {
  const ModelConfig c = parse_config(R"({"d_model": 64, "n_layer": 3, "vocab_size": 10, "d_intermediate": 100,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 32, "dt_limit": [0.0, Infinity], "A_init_range": [1, 16]},
    "attn_layer_idx": [1], "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "causal": true}, "tie_embeddings": false,
    "pad_vocab_size_multiple": 16})",
                                     "config.json");
  EXPECT_EQ(c.ssm_layer, SsmLayer::mamba2);
  EXPECT_TRUE(std::isinf(c.mamba2.dt_limit.high));
  EXPECT_TRUE(c.is_attention(1));
  EXPECT_FALSE(c.is_attention(0));
  EXPECT_EQ(c.attn.num_heads_kv, 2);
  EXPECT_EQ(c.padded_vocab_size(), 16);
}

TEST(Config, InfinityInItsThreeSpellings) {
  for (const char* infinity : {"Infinity", "1e999", R"({"__float__": "Infinity"})"}) {
    const ModelConfig c =
        parse_config(std::string(R"({"model_type": "mamba2", "hidden_size": 64, "num_heads": 8,
      "head_dim": 16, "time_step_limit": [0.001, )") +
                         infinity + "]}",
                     "config.json");
    EXPECT_TRUE(std::isinf(c.mamba2.dt_limit.high)) << infinity;
    EXPECT_FLOAT_EQ(c.mamba2.dt_limit.low, 0.001F);
  }
}

TEST(Config, HuggingFaceFamilies) {
  const ModelConfig falcon = parse_config(R"({"model_type": "falcon_mamba", "hidden_size": 4096,
    "intermediate_size": 8192, "num_hidden_layers": 64, "vocab_size": 65024, "time_step_rank": 256,
    "tie_word_embeddings": false, "eos_token_id": [11, 12]})",
                                          "config.json");
  EXPECT_EQ(falcon.mamba1.mixer_rms_eps, 1e-6);
  EXPECT_EQ(falcon.mamba1.dt_rank, 256);
  EXPECT_EQ(falcon.eos_token_ids, (std::vector<std::int64_t>{11, 12}));
  const ModelConfig pythia =
      parse_config(R"({"model_type": "gpt_neox", "hidden_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 8, "intermediate_size": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000,
    "vocab_size": 50304, "use_parallel_residual": true, "eos_token_id": 0})",
                   "config.json");
  EXPECT_EQ(pythia.gpt_neox.rotary_share, 0.25);
  EXPECT_FALSE(pythia.tie_embeddings);
}

TEST(Config, GenerationConfigOverridesEndOfText) {
  ModelConfig c = parse_config(R"({"model_type": "mamba", "eos_token_id": 5})", "config.json");
  apply_generation_config(c, R"({"eos_token_id": [1, 2]})", "generation_config.json");
  EXPECT_EQ(c.eos_token_ids, (std::vector<std::int64_t>{1, 2}));
}

TEST(Config, OneLineSaysWhatIsWrong) {
  EXPECT_EQ(
      message_of(R"({"model_type": "llama"})"),
      "config.json: model_type is llama, expected model_type mamba, mamba2, falcon_mamba or gpt_neox, or "
      "upstream's fields (d_model, n_layer, ssm_cfg)");
  EXPECT_EQ(message_of(R"({"d_model": -1})"),
            "config.json: d_model is -1, expected an integer from 1 to 16777216");
  EXPECT_EQ(message_of(R"({"d_model": "wide"})"),
            "config.json: d_model is \"wide\", expected an integer from 1 to 16777216");
  EXPECT_EQ(message_of(R"({"d_model": 8, "ssm_cfg": {"layer": "Mamba3"}})"),
            "config.json: ssm_cfg: layer is Mamba3, expected Mamba1 or Mamba2");
  EXPECT_NE(message_of(R"({"d_model": 8, "ssm_cfg": {"d_sate": 3}})").find("unknown field d_sate"),
            std::string::npos);
  EXPECT_NE(message_of(R"({"d_model": 8, "n_layer": 2, "attn_layer_idx": [2]})").find("attn_layer_idx has 2"),
            std::string::npos);
  EXPECT_NE(
      message_of(R"({"model_type": "mamba2", "hidden_size": 64, "num_heads": 3})").find("num_heads 3 x"),
      std::string::npos);
  for (const char* text :
       {"", "{", "[]", "3", "{\"d_model\": 1e400}", "{\"d_model\":", "\"", "{\"a\": \"\\", "nul"})
    EXPECT_NE(message_of(text), "no error") << text;
  const std::string deep(100000, '[');
  EXPECT_NE(message_of(deep), "no error");
  for (const std::string& text : {deep, std::string("{\"d_model\": nope}")})
    EXPECT_EQ(message_of(text).find('\n'), std::string::npos);
}

}  // namespace
}  // namespace krait
