#include "krait/models/config.h"

#include <algorithm>
#include <cmath>

#include "krait/core/error.h"
#include "models/json.h"

namespace krait {
namespace {

constexpr std::int64_t kMaxLayers = 10000;
constexpr std::int64_t kMaxVocab = std::int64_t{1} << 31;

// A d_inner of expand * d_model beyond this would overflow products of sizes further on.
void check_expand(const JsonFields& f, double expand) {
  require(std::isfinite(expand) && expand > 0 && expand <= 1024, f.path(), ": expand is ", expand,
          ", expected a number above 0, at most 1024");
}

Mamba1Config upstream_mamba1(const JsonFields& f) {
  f.only({"layer", "d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale",
          "dt_init_floor", "conv_bias", "bias", "use_fast_path"});
  Mamba1Config c;
  c.d_state = f.integer("d_state", c.d_state);
  c.d_conv = f.integer("d_conv", c.d_conv, 1, 65536);
  c.expand = f.number("expand", c.expand);
  check_expand(f, c.expand);
  if (f.has("dt_rank") && !(f.is_string("dt_rank") && f.string("dt_rank", "") == "auto"))
    c.dt_rank = f.integer("dt_rank", 0);
  c.dt_min = f.number("dt_min", c.dt_min);
  c.dt_max = f.number("dt_max", c.dt_max);
  const std::string init = f.string("dt_init", "random");
  require(init == "random" || init == "constant", f.path(), ": dt_init is ", init,
          ", expected random or constant");
  c.dt_init_random = init == "random";
  c.dt_scale = f.number("dt_scale", c.dt_scale);
  c.dt_init_floor = f.number("dt_init_floor", c.dt_init_floor);
  c.conv_bias = f.boolean("conv_bias", c.conv_bias);
  c.bias = f.boolean("bias", c.bias);
  return c;
}

DtLimit dt_limit(const JsonFields& f, std::string_view key) {
  const auto values = f.numbers(key);
  if (values.empty()) return {};
  require(values.size() == 2, f.path(), ": ", key, " has ", values.size(), " values, expected two");
  require(values[0] <= values[1], f.path(), ": ", key, " is [", values[0], ", ", values[1],
          "], expected the lower limit first");
  return {.low = static_cast<float>(values[0]), .high = static_cast<float>(values[1])};
}

Mamba2Config upstream_mamba2(const JsonFields& f) {
  f.only({"layer",      "d_state",         "d_conv",        "conv_init",  "expand",  "headdim",
          "d_ssm",      "ngroups",         "A_init_range",  "D_has_hdim", "rmsnorm", "norm_before_gate",
          "dt_min",     "dt_max",          "dt_init_floor", "dt_limit",   "bias",    "conv_bias",
          "chunk_size", "use_mem_eff_path"});
  Mamba2Config c;
  c.d_state = f.integer("d_state", c.d_state);
  c.d_conv = f.integer("d_conv", c.d_conv, 1, 65536);
  if (f.has("conv_init")) c.conv_init = f.number("conv_init", 0.0);
  c.expand = f.number("expand", c.expand);
  check_expand(f, c.expand);
  c.headdim = f.integer("headdim", c.headdim);
  c.d_ssm = f.integer("d_ssm", c.d_ssm);
  c.ngroups = f.integer("ngroups", c.ngroups);
  if (const auto range = f.numbers("A_init_range"); !range.empty()) {
    require(range.size() == 2 && range[0] > 0 && range[1] >= range[0], f.path(),
            ": A_init_range: expected two positive numbers, the lower first");
    c.A_init_range = {range[0], range[1]};
  }
  c.D_has_hdim = f.boolean("D_has_hdim", c.D_has_hdim);
  c.rmsnorm = f.boolean("rmsnorm", c.rmsnorm);
  c.norm_before_gate = f.boolean("norm_before_gate", c.norm_before_gate);
  c.dt_min = f.number("dt_min", c.dt_min);
  c.dt_max = f.number("dt_max", c.dt_max);
  c.dt_init_floor = f.number("dt_init_floor", c.dt_init_floor);
  c.dt_limit = dt_limit(f, "dt_limit");
  c.bias = f.boolean("bias", c.bias);
  c.conv_bias = f.boolean("conv_bias", c.conv_bias);
  c.chunk_size = f.integer("chunk_size", c.chunk_size);
  return c;
}

MhaConfig upstream_attention(const JsonFields& f) {
  f.only({"num_heads", "num_heads_kv", "head_dim", "mlp_dim", "qkv_proj_bias", "out_proj_bias",
          "softmax_scale", "causal", "d_conv", "rotary_emb_dim", "rotary_emb_base",
          "rotary_emb_interleaved"});
  MhaConfig c;
  c.num_heads = f.integer("num_heads", 0);
  require(c.num_heads > 0, f.path(), ": num_heads is missing, expected an integer from 1");
  c.num_heads_kv = f.integer("num_heads_kv", 0);
  c.head_dim = f.integer("head_dim", 0);
  c.mlp_dim = f.integer("mlp_dim", 0, 0);
  c.qkv_proj_bias = f.boolean("qkv_proj_bias", c.qkv_proj_bias);
  c.out_proj_bias = f.boolean("out_proj_bias", c.out_proj_bias);
  c.softmax_scale = f.number("softmax_scale", c.softmax_scale);
  require(!f.has("softmax_scale") || (std::isfinite(c.softmax_scale) && c.softmax_scale != 0.0), f.path(),
          ": softmax_scale is ", c.softmax_scale, ", expected a number other than 0");
  c.causal = f.boolean("causal", c.causal);
  c.d_conv = f.integer("d_conv", 0, 0, 65536);
  c.rotary_emb_dim = f.integer("rotary_emb_dim", 0, 0);
  c.rotary_emb_base = f.number("rotary_emb_base", c.rotary_emb_base);
  c.rotary_emb_interleaved = f.boolean("rotary_emb_interleaved", false);
  return c;
}

ModelConfig upstream(const JsonFields& f) {
  ModelConfig c;
  c.d_model = f.integer("d_model", 0);
  c.d_intermediate = f.integer("d_intermediate", 0, 0);
  c.n_layer = f.integer("n_layer", c.n_layer, 1, kMaxLayers);
  c.vocab_size = f.integer("vocab_size", c.vocab_size, 1, kMaxVocab);
  const JsonFields ssm = f.object("ssm_cfg");
  const std::string layer = ssm.string("layer", "Mamba1");
  if (layer == "Mamba1")
    c.mamba1 = upstream_mamba1(ssm);
  else if (layer == "Mamba2")
    c.mamba2 = upstream_mamba2(ssm);
  else
    fail(ErrorKind::invalid_argument, ssm.path(), ": layer is ", layer, ", expected Mamba1 or Mamba2");
  c.ssm_layer = layer == "Mamba2" ? SsmLayer::mamba2 : SsmLayer::mamba1;
  c.attn_layer_idx = f.integers("attn_layer_idx");
  for (const std::int64_t i : c.attn_layer_idx)
    require(i >= 0 && i < c.n_layer, f.path(), ": attn_layer_idx has ", i,
            ", expected 0 to n_layer - 1 = ", c.n_layer - 1);
  if (!c.attn_layer_idx.empty()) c.attn = upstream_attention(f.object("attn_cfg"));
  c.rms_norm = f.boolean("rms_norm", true);
  c.residual_in_fp32 = f.boolean("residual_in_fp32", true);
  c.fused_add_norm = f.boolean("fused_add_norm", true);
  c.pad_vocab_size_multiple = f.integer("pad_vocab_size_multiple", 8, 1, 1 << 20);
  c.tie_embeddings = f.boolean("tie_embeddings", true);
  return c;
}

// What Hugging Face's formats share.
ModelConfig hugging_face(const JsonFields& f, Format format, std::int64_t vocab_size, std::int64_t d_model,
                         std::int64_t n_layer, bool tie) {
  ModelConfig c;
  c.format = format;
  c.vocab_size = f.integer("vocab_size", vocab_size, 1, kMaxVocab);
  c.d_model = f.integer("hidden_size", d_model);
  c.n_layer = f.integer("num_hidden_layers", n_layer, 1, kMaxLayers);
  c.pad_vocab_size_multiple = 1;
  c.tie_embeddings = f.boolean("tie_word_embeddings", tie);
  if (f.has("eos_token_id")) c.eos_token_ids = f.integers("eos_token_id");
  return c;
}

void check_activation(const JsonFields& f) {
  const std::string act = f.string("hidden_act", "silu");
  require(act == "silu" || act == "swish", f.path(), ": hidden_act is ", act, ", expected silu");
}

ModelConfig hf_mamba(const JsonFields& f, Format format) {
  ModelConfig c = hugging_face(f, format, 50280, 768, 32, true);
  check_activation(f);
  c.norm_epsilon = f.number("layer_norm_epsilon", 1e-5);
  c.residual_in_fp32 = f.boolean("residual_in_fp32", true);
  Mamba1Config& m = c.mamba1;
  m.d_state = f.integer("state_size", 16);
  m.d_conv = f.integer("conv_kernel", 4, 1, 65536);
  m.expand = f.number("expand", 2);
  check_expand(f, m.expand);
  m.d_inner = f.integer("intermediate_size", 0);
  if (f.has("time_step_rank") && !(f.is_string("time_step_rank") && f.string("time_step_rank", "") == "auto"))
    m.dt_rank = f.integer("time_step_rank", 0);
  m.bias = f.boolean("use_bias", false);
  m.conv_bias = f.boolean("use_conv_bias", true);
  if (format == Format::falcon_mamba) m.mixer_rms_eps = f.number("mixer_rms_eps", 1e-6);
  return c;
}

ModelConfig hf_mamba2(const JsonFields& f) {
  ModelConfig c = hugging_face(f, Format::mamba2, 32768, 4096, 64, false);
  if (!f.has("eos_token_id")) c.eos_token_ids = {2};
  check_activation(f);
  c.ssm_layer = SsmLayer::mamba2;
  c.norm_epsilon = f.number("layer_norm_epsilon", 1e-5);
  c.residual_in_fp32 = f.boolean("residual_in_fp32", true);
  Mamba2Config& m = c.mamba2;
  m.d_state = f.integer("state_size", 128);
  m.d_conv = f.integer("conv_kernel", 4, 1, 65536);
  m.expand = f.number("expand", 2);
  check_expand(f, m.expand);
  m.headdim = f.integer("head_dim", 64);
  m.ngroups = f.integer("n_groups", 8);
  m.norm_eps = c.norm_epsilon;
  m.dt_limit = dt_limit(f, "time_step_limit");
  m.bias = f.boolean("use_bias", false);
  m.conv_bias = f.boolean("use_conv_bias", true);
  m.chunk_size = f.integer("chunk_size", 256);
  m.d_model = c.d_model;
  const std::int64_t heads = f.integer("num_heads", 128);
  require(heads * m.headdim == m.d_inner(), f.path(), ": num_heads ", heads, " x head_dim ", m.headdim,
          " is ", heads * m.headdim, ", expected expand x hidden_size = ", m.d_inner());
  return c;
}

ModelConfig hf_gpt_neox(const JsonFields& f) {
  ModelConfig c = hugging_face(f, Format::gpt_neox, 50432, 6144, 44, false);
  if (!f.has("eos_token_id")) c.eos_token_ids = {2};
  GptNeoxConfig& g = c.gpt_neox;
  g.num_heads = f.integer("num_attention_heads", g.num_heads);
  g.intermediate_size = f.integer("intermediate_size", g.intermediate_size);
  g.layer_norm_eps = f.number("layer_norm_eps", g.layer_norm_eps);
  g.use_parallel_residual = f.boolean("use_parallel_residual", g.use_parallel_residual);
  const JsonFields rope = f.object("rope_parameters");
  g.rotary_share = rope.number("partial_rotary_factor", f.number("rotary_pct", g.rotary_share));
  g.rotary_base =
      rope.number("rope_theta", f.number("rotary_emb_base", f.number("rope_theta", g.rotary_base)));
  const std::string rope_type = rope.string("rope_type", "default");
  require(rope_type == "default", rope.path(), ": rope_type is ", rope_type, ", expected default");
  require(!f.has("rope_scaling"), f.path(),
          ": rope_scaling is set, expected null: scaled rotary embeddings are unknown");
  g.hidden_act = f.string("hidden_act", g.hidden_act);
  require(g.hidden_act == "gelu" || g.hidden_act == "gelu_new" || g.hidden_act == "gelu_fast" ||
              g.hidden_act == "gelu_pytorch_tanh",
          f.path(), ": hidden_act is ", g.hidden_act,
          ", expected gelu, gelu_new, gelu_fast or gelu_pytorch_tanh");
  g.attention_bias = f.boolean("attention_bias", true);
  c.rms_norm = false;
  c.norm_epsilon = g.layer_norm_eps;
  require(c.d_model % g.num_heads == 0, f.path(), ": hidden_size ", c.d_model,
          " is not a multiple of num_attention_heads ", g.num_heads);
  require(g.rotary_share >= 0 && g.rotary_share <= 1, f.path(), ": the rotary share is ", g.rotary_share,
          ", expected 0 to 1");
  return c;
}

}  // namespace

std::string_view name_of(Format format) {
  switch (format) {
    case Format::upstream: return "mamba_ssm";
    case Format::mamba: return "mamba";
    case Format::mamba2: return "mamba2";
    case Format::falcon_mamba: return "falcon_mamba";
    case Format::gpt_neox: return "gpt_neox";
  }
  return "unknown";
}

std::int64_t ModelConfig::padded_vocab_size() const {
  return (vocab_size + pad_vocab_size_multiple - 1) / pad_vocab_size_multiple * pad_vocab_size_multiple;
}

bool ModelConfig::is_attention(std::int64_t layer) const {
  return std::find(attn_layer_idx.begin(), attn_layer_idx.end(), layer) != attn_layer_idx.end();
}

ModelConfig parse_config(std::string_view text, const std::string& name) {
  const nlohmann::json json = parse_json(text, name);
  const JsonFields f(json, name);
  // Upstream's files have no model_type; its field d_model is no name of Hugging Face's formats.
  const std::string type = f.string("model_type", f.has("d_model") ? "mamba_ssm" : "");
  ModelConfig c;
  if (type == "mamba_ssm")
    c = upstream(f);
  else if (type == "mamba" && !f.has("hidden_size") && f.has("d_model"))
    c = upstream(f);  // upstream's fields under a model_type that a hub added
  else if (type == "mamba")
    c = hf_mamba(f, Format::mamba);
  else if (type == "falcon_mamba")
    c = hf_mamba(f, Format::falcon_mamba);
  else if (type == "mamba2")
    c = hf_mamba2(f);
  else if (type == "gpt_neox")
    c = hf_gpt_neox(f);
  else
    fail(ErrorKind::invalid_argument, name, ": ",
         type.empty() ? std::string("neither model_type nor d_model") : concat("model_type is ", type),
         ", expected model_type mamba, mamba2, falcon_mamba or gpt_neox, or upstream's fields (d_model, "
         "n_layer, "
         "ssm_cfg)");
  require(c.d_model > 0, name, ": d_model is missing, expected an integer from 1");
  require(std::isfinite(c.norm_epsilon) && c.norm_epsilon >= 0, name,
          ": the epsilon of the norms (layer_norm_epsilon, layer_norm_eps) is ", c.norm_epsilon,
          ", expected 0 or more");
  c.mamba1.d_model = c.mamba2.d_model = c.attn.d_model = c.d_model;
  return c;
}

void apply_generation_config(ModelConfig& config, std::string_view text, const std::string& name) {
  const nlohmann::json json = parse_json(text, name);
  const JsonFields f(json, name);
  if (f.has("eos_token_id")) config.eos_token_ids = f.integers("eos_token_id");
}

}  // namespace krait
