#include <cmath>

#include "krait/core/error.h"
#include "krait/modules/block.h"
#include "krait/modules/mha.h"
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

// sum += t, both (T, d_model) and contiguous, sum f32: what a bias gains from one row.
void add_to(Context& ctx, const Tensor& sum, const Tensor& t) {
  linear_backward(ctx, {.dout = t.view({1, -1}), .dbias = sum.view({-1})});
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

  Tensor forward(Context& ctx, Tensor hidden, const Batch& batch, Tape* tape) const override {
    const bool recompute = tape != nullptr && tape->options().recompute == Recompute::block;
    int index = 0;
    for (const NeoxLayer& layer : layers_) {
      if (recompute) tape->frame(index, "input").keep("hidden", ctx.clone(hidden));
      run(ctx, layer, hidden, batch, index, tape);
      if (recompute)
        for (const char* module : {"block", "attention", "mlp"}) tape->drop(index, module);
      ++index;
    }
    if (tape != nullptr) tape->frame(index, "final_layer_norm").keep("hidden", hidden);
    return normed(ctx, final_layer_norm_, hidden);
  }

  Tensor backward(Context& ctx, const Tensor& dout, const Batch& batch, Tape& tape) const override {
    const Tensor dsum = ctx.empty(dout.shape());
    int index = static_cast<int>(layers_.size());
    add_norm_backward(ctx, final_layer_norm_, tape.frame(index, "final_layer_norm")["hidden"], dout, {},
                      {.sum = dsum});
    tape.drop(index);
    while (index-- > 0) {
      const NeoxLayer& layer = layers_[static_cast<std::size_t>(index)];
      if (tape.options().recompute == Recompute::block) {
        run(ctx, layer, tape.frame(index, "input")["hidden"], batch, index, &tape);
        tape.measure();
      }
      run_backward(ctx, layer, dsum, batch, index, tape);
      tape.drop(index);
    }
    return dsum;
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

  void prepare(Context& /*ctx*/) override {}

 private:
  // One layer on the residual stream, in place.
  void run(Context& ctx, const NeoxLayer& layer, const Tensor& hidden, const Batch& batch, int index,
           Tape* tape) const {
    const auto keep = [&](const char* module, const char* name, const Tensor& t) {
      if (tape != nullptr) tape->frame(index, module).keep(name, t);
    };
    if (tape != nullptr) keep("block", "hidden", ctx.clone(hidden));
    const Tensor x = normed(ctx, layer.input_layernorm, hidden);
    const Tensor attended = attend(ctx, layer, x, batch, index, tape);
    keep("attention", "x", x);
    // The MLP of the parallel form reads the stream before attention is added to it.
    Tensor x2;
    if (config_.use_parallel_residual) x2 = normed(ctx, layer.post_attention_layernorm, hidden);
    add(ctx, layer.dense, attended, hidden, tape, attention_site(index));
    if (!config_.use_parallel_residual) {
      if (tape != nullptr) keep("block", "hidden2", ctx.clone(hidden));
      x2 = normed(ctx, layer.post_attention_layernorm, hidden);
    }
    const Tensor wide = layer.dense_h_to_4h(ctx, x2);
    const Tensor active =
        gelu(ctx, {.x = wide, .out = tape == nullptr ? wide : Tensor(), .kind = gelu_kind()});
    keep("mlp", "x", x2);
    keep("mlp", "wide", wide);
    keep("mlp", "active", active);
    add(ctx, layer.dense_4h_to_h, active, hidden, tape, mlp_site(index));
  }

  // `dsum`, in place: the gradient of the stream behind the layer, then in front of it.
  void run_backward(Context& ctx, const NeoxLayer& layer, const Tensor& dsum, const Batch& batch, int index,
                    Tape& tape) const {
    const auto branch = [&](std::uint64_t site) {
      if (tape.options().dropout == 0.0) return dsum;
      const Tensor copy = ctx.clone(dsum);
      tape.dropout(ctx, copy, site);
      return copy;
    };
    const Tape::Frame& block = tape.frame(index, "block");
    const Tape::Frame& mlp = tape.frame(index, "mlp");
    const Tensor dwide = layer.dense_4h_to_h.backward(ctx, mlp["active"], branch(mlp_site(index)));
    gelu_backward(ctx, {.x = mlp["wide"], .dout = dwide, .dx = dwide, .kind = gelu_kind()});
    const Tensor dx2 = layer.dense_h_to_4h.backward(ctx, mlp["x"], dwide);
    if (!config_.use_parallel_residual)
      add_norm_backward(ctx, layer.post_attention_layernorm, block["hidden2"], dx2, dsum, {.sum = dsum});

    const Tape::Frame& attention = tape.frame(index, "attention");
    const std::int64_t T = dsum.size(0);
    const Tensor dattended =
        layer.dense.backward(ctx, attention["attended"].view({T, -1}), branch(attention_site(index)));
    const Tensor dqkv = ctx.empty({T, config_.num_heads, 3, head_dim_}, attention["x"].dtype());
    const Tensor dq = dqkv.select(2, 0);
    const Tensor dk = dqkv.select(2, 1);
    document_attention_backward(ctx, dattended.view({T, config_.num_heads, head_dim_}), batch, 0.0, true,
                                attention, dq, dk, dqkv.select(2, 2));
    turn(ctx, dq, dk, batch, true);
    const Tensor dx = layer.query_key_value.backward(ctx, attention["x"], dqkv.view({T, -1}));
    if (config_.use_parallel_residual)
      add_norm_backward(ctx, layer.post_attention_layernorm, block["hidden"], dx2, dsum, {.sum = dsum});
    add_norm_backward(ctx, layer.input_layernorm, block["hidden"], dx, dsum, {.sum = dsum});
  }

  // sum += layer(x), with dropout in between where the tape asks for it.
  static void add(Context& ctx, const LinearLayer& layer, const Tensor& x, const Tensor& sum,
                  const Tape* tape, std::uint64_t site) {
    if (tape == nullptr || tape->options().dropout == 0.0) {
      linear(ctx, {.x = x, .weight = layer.weight, .bias = layer.bias, .out = sum, .accumulate = true});
      return;
    }
    const Tensor branch = layer(ctx, x);
    tape->dropout(ctx, branch, site);
    add_to(ctx, sum, branch);
  }

  Tensor attend(Context& ctx, const NeoxLayer& layer, const Tensor& x, const Batch& batch, int index,
                Tape* tape) const {
    const std::int64_t T = x.size(0);
    const Tensor qkv = layer.query_key_value(ctx, x).view({T, config_.num_heads, 3, head_dim_});
    const Tensor q = qkv.select(2, 0);
    const Tensor k = qkv.select(2, 1);
    const Tensor v = qkv.select(2, 2);
    turn(ctx, q, k, batch, false);
    const Tensor attended =
        tape != nullptr ? document_attention(ctx, q, k, v, batch, 0.0, true, tape->frame(index, "attention"))
                        : cached_attention(ctx, q, k, v, batch, index, 0.0, true);
    return attended.view({T, config_.num_heads * head_dim_});
  }

  void turn(Context& ctx, const Tensor& q, const Tensor& k, const Batch& batch, bool inverse) const {
    for (const Tensor& turned : {q, k})
      rotary_embedding(ctx, {.x = turned,
                             .positions = batch.positions(),
                             .dim = rotary_dim_,
                             .base = config_.rotary_base,
                             .inverse = inverse});
  }

  [[nodiscard]] GeluKind gelu_kind() const {
    return config_.hidden_act == "gelu" ? GeluKind::exact : GeluKind::tanh;
  }

  // Places of dropout within one pass; 0 is the embedding's.
  static std::uint64_t attention_site(int index) { return 1 + 2 * static_cast<std::uint64_t>(index); }
  static std::uint64_t mlp_site(int index) { return 2 + 2 * static_cast<std::uint64_t>(index); }

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
