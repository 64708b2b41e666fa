#include "krait/models/describe.h"

#include <algorithm>

#include "krait/core/error.h"

namespace krait {
namespace {

std::string architecture_of(const ModelConfig& c) {
  if (c.format == Format::gpt_neox) return concat(c.n_layer, " x GPT-NeoX");
  std::int64_t attention = 0;
  for (std::int64_t i = 0; i < c.n_layer; ++i) attention += c.is_attention(i) ? 1 : 0;
  const std::string ssm = c.format == Format::falcon_mamba  ? "FalconMamba"
                          : c.ssm_layer == SsmLayer::mamba2 ? "Mamba2"
                                                            : "Mamba1";
  std::string text;
  if (attention < c.n_layer) text = concat(c.n_layer - attention, " x ", ssm);
  if (attention > 0) text += concat(text.empty() ? "" : ", ", attention, " x MHA");
  if (c.d_intermediate > 0) text += concat(", ", c.n_layer, " x GatedMLP");
  return text;
}

std::string part_of(const std::string& name) {
  const auto has = [&](std::string_view piece) { return name.find(piece) != std::string::npos; };
  if (has("embedding.weight") || has("embed_in")) return "embedding";
  if (has("lm_head") || has("embed_out")) return "head";
  if (has(".mlp.")) return "mlps";
  if (has(".mixer.") || has(".attention.")) return "mixers";
  return "norms";
}

}  // namespace

ModelDescription describe(LanguageModel& model) {
  const ModelConfig& c = model.config();
  ModelDescription d;
  d.format = name_of(c.format);
  d.architecture = architecture_of(c);
  d.d_model = c.d_model;
  d.n_layer = c.n_layer;
  d.vocab_size = c.vocab_size;
  d.padded_vocab_size = c.padded_vocab_size();
  d.tied_embeddings = c.tie_embeddings;
  model.visit([&](const Parameter& p) {
    d.parameters += p.tensor.numel();
    d.parameters_by_part[part_of(p.name)] += p.tensor.numel();
    d.bytes_by_dtype[std::string(name_of(p.tensor.dtype()))] += static_cast<std::int64_t>(p.tensor.nbytes());
    d.weight_bytes += static_cast<std::int64_t>(p.tensor.nbytes());
  });
  const auto pool = model.make_pool();
  d.state_bytes_per_sequence = static_cast<std::int64_t>(pool->fixed_bytes());
  d.state_bytes_per_token = static_cast<std::int64_t>(pool->bytes_per_token());
  return d;
}

}  // namespace krait
