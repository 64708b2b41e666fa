#include <cmath>
#include <utility>

#include "krait/core/error.h"
#include "krait/modules/block.h"
#include "models/backbones.h"
#include "modules/initialize.h"
#include "modules/step.h"

namespace krait {
namespace {

std::unique_ptr<Mixer> make_mixer(const ModelConfig& c, std::int64_t layer) {
  if (c.is_attention(layer)) return std::make_unique<Mha>(c.attn);
  if (c.ssm_layer == SsmLayer::mamba2) return std::make_unique<Mamba2>(c.mamba2);
  return std::make_unique<Mamba1>(c.mamba1);
}

// Upstream's MixerModel.
class MixerModel final : public Backbone {
 public:
  explicit MixerModel(const ModelConfig& c)
      : norm_f_{.channels = c.d_model, .rms = c.rms_norm, .eps = c.norm_epsilon} {
    for (std::int64_t i = 0; i < c.n_layer; ++i)
      blocks_.emplace_back(make_mixer(c, i), norm_f_,
                           c.d_intermediate > 0
                               ? std::optional<GatedMlp>(GatedMlp(c.d_model, c.d_intermediate))
                               : std::nullopt);
  }

  Tensor forward(Context& ctx, Tensor hidden, const Batch& batch, Tape* tape) const override {
    ResidualStream stream{.hidden = hidden, .residual = {}, .dtype = hidden.dtype()};
    hidden = {};  // the first block may let go of it
    int layer = 0;
    for (const Block& block : blocks_) block.forward(ctx, stream, batch, layer++, tape);
    const Tensor out = add_norm(ctx, norm_f_, stream, tape != nullptr);
    if (tape != nullptr) tape->frame(layer, "norm_f").keep("residual", stream.residual);
    return out;
  }

  void step(Context& ctx, const Tensor& embedded, const Batch& batch, const Tensor& head_weight,
            const Tensor& logits) const override {
    ResidualStream stream{.hidden = embedded, .residual = {}, .dtype = embedded.dtype()};
    int layer = 0;
    for (const Block& block : blocks_) block.forward(ctx, stream, batch, layer++);
    ProjectionInput normed = input_of(norm_f_);
    normed.residual = stream.residual;
    projection(ctx, {.x = stream.hidden, .input = normed, .weight = head_weight, .out = logits});
  }

  bool step_at_once(Context& ctx, const Tensor& ids, const Tensor& embedding, const Batch& batch,
                    const Tensor& head_weight, const Tensor& logits) const override {
    DecodeStepArgs args{.id = ids,
                        .row = batch.state_indices(),
                        .embedding = embedding,
                        .norm_weight = norm_f_.weight,
                        .norm_bias = norm_f_.bias,
                        .head = head_weight,
                        .logits = logits};
    DecodeModel& model = args.model;
    model.rms = norm_f_.rms;
    model.eps = norm_f_.eps;
    for (const Block& block : blocks_) {
      const int i = static_cast<int>(model.layers.size());
      DecodeLayer& layer = model.layers.emplace_back();
      if (block.has_mlp() || !block.mixer().describe(model, layer)) return false;
      layer.norm_weight = block.norm().weight;
      layer.norm_bias = block.norm().bias;
      layer.conv_state = batch.pool().conv(i);
      layer.ssm_state = batch.pool().ssm(i);
    }
    model.sizes.layers = static_cast<std::int64_t>(blocks_.size());
    model.sizes.d_model = embedding.size(1);
    model.sizes.vocabulary = embedding.size(0);
    return decode_step(ctx, args);
  }

  // One tensor walks back through all layers: the gradient of the residual stream.
  Tensor backward(Context& ctx, const Tensor& dout, const Batch& batch, Tape& tape) const override {
    const StreamGradient dsum{
        .sum = ctx.empty(dout.shape()),
        .rounded = dout.dtype() == DType::f32 ? Tensor() : ctx.empty(dout.shape(), dout.dtype())};
    int layer = static_cast<int>(blocks_.size());
    add_norm_backward(ctx, norm_f_, tape.frame(layer, "norm_f")["residual"], dout, {}, dsum);
    tape.drop(layer);
    while (layer-- > 0) blocks_[static_cast<std::size_t>(layer)].backward(ctx, dsum, batch, layer, tape);
    return dsum.sum;
  }

  [[nodiscard]] std::vector<LayerStateShape> state_shapes() const override {
    std::vector<LayerStateShape> shapes;
    for (const Block& block : blocks_) shapes.push_back(block.mixer().state_shape());
    return shapes;
  }

  void visit(const ParameterVisitor& visitor) override {
    for (std::size_t i = 0; i < blocks_.size(); ++i) blocks_[i].visit(concat("backbone.layers.", i), visitor);
    norm_f_.visit("backbone.norm_f", visitor);
  }

  void initialize(Rng& rng, const std::function<void()>& done) override {
    const double scale = 1.0 / std::sqrt(static_cast<double>(blocks_.size()));
    for (Block& block : blocks_) {
      block.initialize(rng);
      // The projections that write to the residual stream start smaller (Radford et al. 2019).
      block.visit("", [&](const Parameter& p) {
        if (!p.name.ends_with("out_proj.weight") && !p.name.ends_with("fc2.weight")) return;
        for (float& value : p.tensor.span<float>()) value = static_cast<float>(value * scale);
      });
      done();
    }
    krait::initialize(norm_f_);
  }

  void prepare(Context& ctx) override {
    for (Block& block : blocks_) block.mixer().prepare(ctx);
  }

 private:
  NormLayer norm_f_;
  std::vector<Block> blocks_;
};

}  // namespace

std::unique_ptr<Backbone> make_mixer_model(const ModelConfig& config) {
  return std::make_unique<MixerModel>(config);
}

}  // namespace krait
