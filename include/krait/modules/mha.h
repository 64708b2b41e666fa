// Multi-head attention as upstream's hybrid models use it: grouped queries, an optional causal convolution
// over q, k and v, rotary embedding, and an optional gated MLP computed beside the attention.
#pragma once

#include <cstdint>

#include "krait/modules/mixer.h"

namespace krait {

struct MhaConfig {
  std::int64_t d_model = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_heads_kv = 0;  // 0: num_heads
  std::int64_t head_dim = 0;      // 0: d_model / num_heads
  std::int64_t mlp_dim = 0;       // rounded up to a multiple of 256
  bool qkv_proj_bias = true;
  bool out_proj_bias = true;
  double softmax_scale = 0.0;  // 0: head_dim^-0.5
  bool causal = false;
  std::int64_t d_conv = 0;
  std::int64_t rotary_emb_dim = 0;
  double rotary_emb_base = 10000.0;
  bool rotary_emb_interleaved = false;
};

class Mha final : public Mixer {
 public:
  explicit Mha(const MhaConfig& config);

  Tensor forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer, Tape* tape = nullptr,
                 Tensor* sum = nullptr) const override;
  Tensor backward(Context& ctx, const Tensor& dout, const Batch& batch, int layer, Tape& tape) const override;
  [[nodiscard]] LayerStateShape state_shape() const override;
  void visit(const std::string& prefix, const ParameterVisitor& visitor) override;
  void initialize(Rng& rng) override;
  [[nodiscard]] std::string_view kind() const override { return "MHA"; }

  [[nodiscard]] const MhaConfig& config() const { return config_; }

 private:
  struct Heads {
    Tensor q;  // (T, num_heads, head_dim)
    Tensor k;  // (T, num_heads_kv, head_dim)
    Tensor v;
  };
  [[nodiscard]] Heads split_heads(const Tensor& qkv) const;
  void turn(Context& ctx, const Heads& heads, const Batch& batch, bool inverse) const;
  [[nodiscard]] std::int64_t qkv_dim() const {
    return config_.head_dim * (config_.num_heads + 2 * config_.num_heads_kv);
  }

  MhaConfig config_;
  LinearLayer in_proj_;   // (qkv_dim + mlp_dim, d_model): q, k, v, mlp up, mlp gate
  ConvLayer conv1d_;      // (qkv_dim, 1, d_conv), where d_conv > 0
  LinearLayer out_proj_;  // (d_model, head_dim num_heads + mlp_dim / 2)
};

// Attention of a batch over its cached keys and values: q (T, H, head_dim), k and v (T, Hkv, head_dim) of the
// batch's tokens, appended to the caches of `layer`. Returns (T, H, head_dim). Used by Mha and GPT-NeoX.
Tensor cached_attention(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Batch& batch,
                        int layer, double scale, bool causal);

// In training: each document by itself, without a cache. The frame gets q, k, v, the result and what else
// document_attention_backward reads, which writes dq, dk and dv.
Tensor document_attention(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Batch& batch,
                          double scale, bool causal, Tape::Frame& frame);
void document_attention_backward(Context& ctx, const Tensor& dout, const Batch& batch, double scale,
                                 bool causal, const Tape::Frame& frame, const Tensor& dq, const Tensor& dk,
                                 const Tensor& dv);

}  // namespace krait
