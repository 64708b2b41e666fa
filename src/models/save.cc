#include "krait/models/save.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <system_error>
#include <vector>

#include "krait/core/error.h"
#include "krait/io/atomic_file.h"
#include "krait/io/safetensors.h"
#include "krait/io/torch_bin.h"
#include "models/json.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr double kUpstreamEpsilon = 1e-5;
// Python's json reads and writes infinity as Infinity, which nlohmann's cannot: a text in its place.

Json number(double value) {
  if (std::isinf(value)) return value > 0 ? "@Infinity@" : "@-Infinity@";
  if (value == std::floor(value) && std::abs(value) < 1e15) return static_cast<std::int64_t>(value);
  return value;
}

// The shortest decimal that gives this float, as a double: 0.2F is 0.2, and 0.0F is 0.0.
Json decimal(float value) {
  if (std::isinf(value)) return number(double{value});
  char text[32];
  const auto end = std::to_chars(text, text + sizeof(text) - 1, value).ptr;
  *end = '\0';
  return std::strtod(text, nullptr);
}

std::string text_of(const Json& json) {
  std::string text = json.dump(4);
  for (std::size_t at = 0; (at = text.find("\"@", at)) != std::string::npos;) {
    const std::size_t end = text.find("@\"", at);
    text = text.substr(0, at) + text.substr(at + 2, end - at - 2) + text.substr(end + 2);
  }
  return text + "\n";
}

class Refusal {
 public:
  explicit Refusal(const char* format) : format_(format) {}
  void unless(bool fits, const std::string& what) const {
    require(fits, "the ", format_, " format cannot express ", what);
  }

 private:
  const char* format_;
};

// Adds what differs from the default: configs of upstream are that short.
template <typename T>
void add(Json& json, const char* key, const T& value, const T& by_default) {
  if (value != by_default) json[key] = value;
}
void add_number(Json& json, const char* key, double value, double by_default) {
  if (value != by_default) json[key] = number(value);
}

Json limits(const DtLimit& limit) { return Json::array({decimal(limit.low), decimal(limit.high)}); }

// d_inner = int(expand * d_model), whatever way it was given.
Json expand_of(std::int64_t d_inner, std::int64_t d_model, const Refusal& refuse) {
  const double expand = static_cast<double>(d_inner) / static_cast<double>(d_model);
  refuse.unless(static_cast<std::int64_t>(expand * static_cast<double>(d_model)) == d_inner,
                concat("d_inner ", d_inner, " as a multiple of d_model ", d_model));
  return number(expand);
}

Json upstream_mamba1(const ModelConfig& c, const Refusal& refuse) {
  const Mamba1 complete(c.mamba1);  // fills in what is 0
  const Mamba1Config& m = complete.config();
  const Mamba1Config by_default;
  refuse.unless(!m.mixer_rms_eps, "FalconMamba's norms over dt, B and C");
  Json json = Json::object();
  json["layer"] = "Mamba1";
  add(json, "d_state", m.d_state, by_default.d_state);
  add(json, "d_conv", m.d_conv, by_default.d_conv);
  if (m.d_inner != 2 * c.d_model) json["expand"] = expand_of(m.d_inner, c.d_model, refuse);
  add(json, "dt_rank", m.dt_rank, (c.d_model + 15) / 16);
  add_number(json, "dt_min", m.dt_min, by_default.dt_min);
  add_number(json, "dt_max", m.dt_max, by_default.dt_max);
  if (!m.dt_init_random) json["dt_init"] = "constant";
  add_number(json, "dt_scale", m.dt_scale, by_default.dt_scale);
  add_number(json, "dt_init_floor", m.dt_init_floor, by_default.dt_init_floor);
  add(json, "conv_bias", m.conv_bias, by_default.conv_bias);
  add(json, "bias", m.bias, by_default.bias);
  return json;
}

Json upstream_mamba2(const ModelConfig& c, const Refusal& refuse) {
  const Mamba2Config& m = c.mamba2;
  const Mamba2Config by_default;
  refuse.unless(m.norm_eps == kUpstreamEpsilon, concat("a gated norm with epsilon ", m.norm_eps));
  Json json = Json::object();
  json["layer"] = "Mamba2";
  add(json, "d_state", m.d_state, by_default.d_state);
  add(json, "d_conv", m.d_conv, by_default.d_conv);
  if (m.conv_init) json["conv_init"] = *m.conv_init;
  add_number(json, "expand", m.expand, by_default.expand);
  add(json, "headdim", m.headdim, by_default.headdim);
  if (m.d_ssm != 0 && m.d_ssm != m.d_inner()) json["d_ssm"] = m.d_ssm;
  add(json, "ngroups", m.ngroups, by_default.ngroups);
  if (m.A_init_range != by_default.A_init_range)
    json["A_init_range"] = Json::array({number(m.A_init_range.first), number(m.A_init_range.second)});
  add(json, "D_has_hdim", m.D_has_hdim, by_default.D_has_hdim);
  add(json, "rmsnorm", m.rmsnorm, by_default.rmsnorm);
  add(json, "norm_before_gate", m.norm_before_gate, by_default.norm_before_gate);
  add_number(json, "dt_min", m.dt_min, by_default.dt_min);
  add_number(json, "dt_max", m.dt_max, by_default.dt_max);
  add_number(json, "dt_init_floor", m.dt_init_floor, by_default.dt_init_floor);
  if (m.dt_limit.low != by_default.dt_limit.low || m.dt_limit.high != by_default.dt_limit.high)
    json["dt_limit"] = limits(m.dt_limit);
  add(json, "bias", m.bias, by_default.bias);
  add(json, "conv_bias", m.conv_bias, by_default.conv_bias);
  add(json, "chunk_size", m.chunk_size, by_default.chunk_size);
  return json;
}

Json upstream_attention(const MhaConfig& a) {
  const MhaConfig by_default;
  Json json = Json::object();
  json["num_heads"] = a.num_heads;
  add(json, "num_heads_kv", a.num_heads_kv, by_default.num_heads_kv);
  add(json, "head_dim", a.head_dim, by_default.head_dim);
  add(json, "mlp_dim", a.mlp_dim, by_default.mlp_dim);
  add(json, "qkv_proj_bias", a.qkv_proj_bias, by_default.qkv_proj_bias);
  add(json, "out_proj_bias", a.out_proj_bias, by_default.out_proj_bias);
  add_number(json, "softmax_scale", a.softmax_scale, by_default.softmax_scale);
  add(json, "causal", a.causal, by_default.causal);
  add(json, "d_conv", a.d_conv, by_default.d_conv);
  add(json, "rotary_emb_dim", a.rotary_emb_dim, by_default.rotary_emb_dim);
  add_number(json, "rotary_emb_base", a.rotary_emb_base, by_default.rotary_emb_base);
  add(json, "rotary_emb_interleaved", a.rotary_emb_interleaved, by_default.rotary_emb_interleaved);
  return json;
}

Json upstream_config(const ModelConfig& c, const char* format) {
  const Refusal refuse(format);
  refuse.unless(c.format != Format::gpt_neox, "a GPT-NeoX model");
  refuse.unless(c.norm_epsilon == kUpstreamEpsilon, concat("norms with epsilon ", c.norm_epsilon));
  Json json = Json::object();
  json["d_model"] = c.d_model;
  json["d_intermediate"] = c.d_intermediate;
  json["n_layer"] = c.n_layer;
  json["vocab_size"] = c.vocab_size;
  json["ssm_cfg"] = c.ssm_layer == SsmLayer::mamba2 ? upstream_mamba2(c, refuse) : upstream_mamba1(c, refuse);
  json["attn_layer_idx"] = c.attn_layer_idx;
  json["attn_cfg"] = c.attn_layer_idx.empty() ? Json::object() : upstream_attention(c.attn);
  json["rms_norm"] = c.rms_norm;
  json["residual_in_fp32"] = c.residual_in_fp32;
  json["fused_add_norm"] = c.fused_add_norm;
  json["pad_vocab_size_multiple"] = c.pad_vocab_size_multiple;
  json["tie_embeddings"] = c.tie_embeddings;
  return json;
}

// Hugging Face's vocabulary has no padding: every row of the embedding counts.
Json hf_common(const ModelConfig& c, const char* architecture) {
  Json json = Json::object();
  json["architectures"] = Json::array({architecture});
  json["model_type"] = c.format == Format::upstream ? (c.ssm_layer == SsmLayer::mamba2 ? "mamba2" : "mamba")
                                                    : std::string(name_of(c.format));
  json["hidden_size"] = c.d_model;
  json["num_hidden_layers"] = c.n_layer;
  json["vocab_size"] = c.padded_vocab_size();
  json["tie_word_embeddings"] = c.tie_embeddings;
  if (c.eos_token_ids.size() == 1)
    json["eos_token_id"] = c.eos_token_ids[0];
  else
    json["eos_token_id"] = c.eos_token_ids;
  json["bos_token_id"] = c.eos_token_ids.empty() ? 0 : c.eos_token_ids[0];
  return json;
}

Json hf_gpt_neox(const ModelConfig& c) {
  const GptNeoxConfig& g = c.gpt_neox;
  Json json = hf_common(c, "GPTNeoXForCausalLM");
  json["num_attention_heads"] = g.num_heads;
  json["intermediate_size"] = g.intermediate_size;
  json["layer_norm_eps"] = g.layer_norm_eps;
  json["use_parallel_residual"] = g.use_parallel_residual;
  json["rotary_pct"] = g.rotary_share;
  json["rotary_emb_base"] = number(g.rotary_base);
  json["hidden_act"] = g.hidden_act;
  json["attention_bias"] = g.attention_bias;
  return json;
}

// What the configs of both mixers have, in the order in which files give it: sizes first, then the range that
// dt starts from, then biases and norms.
template <typename MixerConfig>
void add_hf_sizes(Json& json, const MixerConfig& m) {
  json["state_size"] = m.d_state;
  json["conv_kernel"] = m.d_conv;
  json["expand"] = number(m.expand);
}
template <typename MixerConfig>
void add_hf_time_steps(Json& json, const MixerConfig& m) {
  json["time_step_min"] = m.dt_min;
  json["time_step_max"] = m.dt_max;
  json["time_step_floor"] = m.dt_init_floor;
}
template <typename MixerConfig>
void add_hf_biases_and_norm(Json& json, const ModelConfig& c, const MixerConfig& m) {
  json["use_bias"] = m.bias;
  json["use_conv_bias"] = m.conv_bias;
  json["layer_norm_epsilon"] = c.norm_epsilon;
}

Json hf_mamba1(const ModelConfig& c) {
  const Mamba1 complete(c.mamba1);
  const Mamba1Config& m = complete.config();
  const bool falcon = m.mixer_rms_eps.has_value();
  Json json = hf_common(c, falcon ? "FalconMambaForCausalLM" : "MambaForCausalLM");
  add_hf_sizes(json, m);
  json["intermediate_size"] = m.d_inner;
  json["time_step_rank"] = m.dt_rank;
  add_hf_time_steps(json, m);
  json["time_step_scale"] = m.dt_scale;
  json["time_step_init_scheme"] = m.dt_init_random ? "random" : "constant";
  add_hf_biases_and_norm(json, c, m);
  if (falcon) json["mixer_rms_eps"] = *m.mixer_rms_eps;
  return json;
}

Json hf_mamba2(const ModelConfig& c, const Refusal& refuse) {
  const Mamba2Config& m = c.mamba2;
  refuse.unless(m.d_ssm == 0 || m.d_ssm == m.d_inner(), concat("d_ssm ", m.d_ssm, " beside d_inner"));
  refuse.unless(!m.D_has_hdim, "D_has_hdim");
  refuse.unless(m.rmsnorm, "rmsnorm false");
  refuse.unless(!m.norm_before_gate, "norm_before_gate");
  refuse.unless(m.norm_eps == c.norm_epsilon, "a gated norm with an epsilon of its own");
  Json json = hf_common(c, "Mamba2ForCausalLM");
  add_hf_sizes(json, m);
  json["head_dim"] = m.headdim;
  json["num_heads"] = m.d_inner() / m.headdim;
  json["n_groups"] = m.ngroups;
  json["chunk_size"] = m.chunk_size;
  json["time_step_limit"] = limits(m.dt_limit);
  add_hf_time_steps(json, m);
  add_hf_biases_and_norm(json, c, m);
  return json;
}

Json hf_config(const ModelConfig& c) {
  if (c.format == Format::gpt_neox) return hf_gpt_neox(c);
  const Refusal refuse("hf");
  refuse.unless(c.attn_layer_idx.empty(), "attention layers");
  refuse.unless(c.d_intermediate == 0, "MLP layers");
  refuse.unless(c.rms_norm, "LayerNorm (rms_norm false)");
  Json json = c.ssm_layer == SsmLayer::mamba1 ? hf_mamba1(c) : hf_mamba2(c, refuse);
  json["residual_in_fp32"] = c.residual_in_fp32;
  json["hidden_act"] = "silu";
  return json;
}

bool upstream_has(const ModelConfig& c) {
  return c.format != Format::gpt_neox && c.norm_epsilon == kUpstreamEpsilon &&
         (c.ssm_layer == SsmLayer::mamba1 ? !c.mamba1.mixer_rms_eps.has_value()
                                          : c.mamba2.norm_eps == kUpstreamEpsilon);
}

bool uses_hf_config(const ModelConfig& c, SaveFormat format) {
  return format == SaveFormat::hf || (format == SaveFormat::krait && !upstream_has(c));
}

std::string name_in_file(const std::string& name, const ModelConfig& c, bool hf) {
  if (hf && c.format != Format::gpt_neox && name == "backbone.embedding.weight")
    return "backbone.embeddings.weight";
  return name;
}

// AutoTokenizer asks for this file beside tokenizer.json.
constexpr std::string_view kTokenizerConfig =
    "{\n    \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"
    "    \"clean_up_tokenization_spaces\": false\n}\n";

void make_directory(const fs::path& directory) {
  std::error_code error;
  require(!fs::exists(directory, error) || fs::is_directory(directory, error), directory.string(),
          ": is a file, expected a directory");
  fs::create_directories(directory, error);
  if (error) fail(ErrorKind::io, directory.string(), ": cannot be made: ", error.message());
}

}  // namespace

std::string config_json(const ModelConfig& config, SaveFormat format) {
  if (uses_hf_config(config, format)) return text_of(hf_config(config));
  return text_of(upstream_config(config, format == SaveFormat::krait ? "krait" : "upstream"));
}

void save_language_model(LanguageModel& model, const fs::path& directory, const SaveOptions& options) {
  const ModelConfig& c = model.config();
  require(!options.dtype || *options.dtype == DType::f32 || *options.dtype == DType::bf16 ||
              *options.dtype == DType::f16,
          "dtype is ", options.dtype.value_or(DType::f32), ", expected f32, bf16 or f16");
  const std::string config = config_json(c, options.format);
  const bool hf = uses_hf_config(c, options.format);
  io::TensorMap tensors;
  model.visit([&](const Parameter& p) {
    require(p.tensor.defined(), "parameter ", p.name, " is absent: the model has no weights yet");
    const DType dtype =
        p.kind == ParameterKind::matrix ? options.dtype.value_or(p.tensor.dtype()) : DType::f32;
    tensors[name_in_file(p.name, c, hf)] = model.memory().to_host(p.tensor).to(dtype);
  });
  const bool bin = options.format == SaveFormat::upstream;
  // Upstream's loader wants the head, tied or not.
  if (bin && c.tie_embeddings) tensors["lm_head.weight"] = tensors.at("backbone.embedding.weight");

  make_directory(directory);
  const char* shadowing = bin ? "model.safetensors" : "model.safetensors.index.json";
  for (const char* other : {shadowing, bin ? "model.safetensors.index.json" : "pytorch_model.bin"})
    require(
        !fs::exists(directory / other), (directory / other).string(),
        ": is there already, and loaders would read it instead of, or beside, what is to be saved; expected "
        "another directory");
  if (bin)
    io::write_torch_bin(directory / "pytorch_model.bin", tensors);
  else
    io::write_safetensors(directory / "model.safetensors", tensors, {{"format", "pt"}});
  if (!options.tokenizer_json.empty()) {
    io::write_file(directory / "tokenizer.json", options.tokenizer_json);
    if (hf) io::write_file(directory / "tokenizer_config.json", kTokenizerConfig);
  }
  // Upstream's config has no place for the ids that end a text; its own is 0.
  if (!hf && c.eos_token_ids != std::vector<std::int64_t>{0})
    io::write_file(directory / "generation_config.json", text_of(Json{{"eos_token_id", c.eos_token_ids}}));
  io::write_file(directory / "config.json", config);
}

}  // namespace krait
