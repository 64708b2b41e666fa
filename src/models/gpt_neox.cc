#include <cmath>

#include "krait/core/error.h"
#include "krait/ops/activation.h"
#include "krait/ops/linear.h"
#include "krait/ops/norm.h"
#include "krait/ops/rotary.h"
#include "models/backbones.h"
#include "modules/initialize.h"

namespace krait {
namespace {

Tensor normed(Context& ctx, const NormLayer& layer, const Tensor& x) {
  return layer_norm(ctx, {.x = x, .weight = layer.weight, .bias = layer.bias, .eps = layer.eps}).out;
}

struct NeoxLayer {
  NormLayer input_layernorm;
  NormLayer post_attention_layernorm;
  LinearLayer query_key_value;  // (3 d_model, d_model): rows of head h are its q, then k, then v
  LinearLayer dense;
  LinearLayer dense_h_to_4h;
  LinearLayer dense_4h_to_h;

  void visit(const std::string& prefix, const ParameterVisitor& visitor) {
    input_layernorm.visit(prefix + ".input_layernorm", visitor);
    post_attention_layernorm.visit(prefix + ".post_attention_layernorm", visitor);
    query_key_value.visit(prefix + ".attention.query_key_value", visitor);
    dense.visit(prefix + ".attention.dense", visitor);
    dense_h_to_4h.visit(prefix + ".mlp.dense_h_to_4h", visitor);
    dense_4h_to_h.visit(prefix + ".mlp.dense_4h_to_h", visitor);
  }
};

// GPT-NeoX with its parallel (x + attn(ln1 x) + mlp(ln2 x)) or sequential residual.
class GptNeox final : public Backbone {
 public:
  explicit GptNeox(const ModelConfig& c)
      : config_(c.gpt_neox),
        head_dim_(c.d_model / c.gpt_neox.num_heads),
        rotary_dim_(static_cast<std::int64_t>(static_cast<double>(head_dim_) * config_.rotary_share)),
        final_layer_norm_{.channels = c.d_model, .rms = false, .eps = c.norm_epsilon} {
    require(rotary_dim_ % 2 == 0, "gpt_neox: ", rotary_dim_, " rotary dimensions, expected an even number");
    const std::int64_t d = c.d_model;
    const bool bias = config_.attention_bias;
    for (std::int64_t i = 0; i < c.n_layer; ++i)
      layers_.push_back({.input_layernorm = final_layer_norm_,
                         .post_attention_layernorm = final_layer_norm_,
                         .query_key_value = {.in = d, .out = 3 * d, .has_bias = bias},
                         .dense = {.in = d, .out = d, .has_bias = bias},
                         .dense_h_to_4h = {.in = d, .out = config_.intermediate_size, .has_bias = true},
                         .dense_4h_to_h = {.in = config_.intermediate_size, .out = d, .has_bias = true}});
  }

  Tensor forward(Context& ctx, Tensor hidden, const Batch& batch) const override {
    int index = 0;
    for (const NeoxLayer& layer : layers_) {
      const Tensor attended = attend(ctx, layer, normed(ctx, layer.input_layernorm, hidden), batch, index++);
      // The MLP of the parallel form reads the stream before attention is added to it.
      if (config_.use_parallel_residual) {
        const Tensor x = normed(ctx, layer.post_attention_layernorm, hidden);
        add(ctx, layer.dense, attended, hidden);
        add_mlp(ctx, layer, x, hidden);
      } else {
        add(ctx, layer.dense, attended, hidden);
        add_mlp(ctx, layer, normed(ctx, layer.post_attention_layernorm, hidden), hidden);
      }
    }
    return normed(ctx, final_layer_norm_, hidden);
  }

  [[nodiscard]] std::vector<LayerStateShape> state_shapes() const override {
    return std::vector<LayerStateShape>(layers_.size(),
                                        {.conv = {}, .ssm = {}, .kv = {2, config_.num_heads, head_dim_}});
  }

  void visit(const ParameterVisitor& visitor) override {
    for (std::size_t i = 0; i < layers_.size(); ++i) layers_[i].visit(concat("gpt_neox.layers.", i), visitor);
    final_layer_norm_.visit("gpt_neox.final_layer_norm", visitor);
  }

  void initialize(Rng& rng, const std::function<void()>& done) override {
    for (NeoxLayer& layer : layers_) {
      for (NormLayer* n : {&layer.input_layernorm, &layer.post_attention_layernorm}) krait::initialize(*n);
      for (LinearLayer* l :
           {&layer.query_key_value, &layer.dense, &layer.dense_h_to_4h, &layer.dense_4h_to_h})
        krait::initialize(*l, rng);
      done();
    }
    krait::initialize(final_layer_norm_);
  }

  void prepare() override {}

 private:
  // sum += layer(x)
  static void add(Context& ctx, const LinearLayer& layer, const Tensor& x, const Tensor& sum) {
    linear(ctx, {.x = x, .weight = layer.weight, .bias = layer.bias, .out = sum, .accumulate = true});
  }

  void add_mlp(Context& ctx, const NeoxLayer& layer, const Tensor& x, const Tensor& sum) const {
    const Tensor wide = layer.dense_h_to_4h(ctx, x);
    const GeluKind kind = config_.hidden_act == "gelu" ? GeluKind::exact : GeluKind::tanh;
    add(ctx, layer.dense_4h_to_h, gelu(ctx, {.x = wide, .out = wide, .kind = kind}), sum);
  }

  Tensor attend(Context& ctx, const NeoxLayer& layer, const Tensor& x, const Batch& batch, int index) const {
    const std::int64_t T = x.size(0);
    const Tensor qkv = layer.query_key_value(ctx, x).view({T, config_.num_heads, 3, head_dim_});
    const Tensor q = qkv.select(2, 0);
    const Tensor k = qkv.select(2, 1);
    for (const Tensor& turned : {q, k})
      rotary_embedding(
          ctx,
          {.x = turned, .positions = batch.positions(), .dim = rotary_dim_, .base = config_.rotary_base});
    return cached_attention(ctx, q, k, qkv.select(2, 2), batch, index, 0.0, true)
        .view({T, config_.num_heads * head_dim_});
  }

  GptNeoxConfig config_;
  std::int64_t head_dim_;
  std::int64_t rotary_dim_;
  NormLayer final_layer_norm_;
  std::vector<NeoxLayer> layers_;
};

}  // namespace

std::unique_ptr<Backbone> make_gpt_neox(const ModelConfig& config) {
  return std::make_unique<GptNeox>(config);
}

}  // namespace krait
