#include "krait/modules/gated_mlp.h"

#include "krait/core/error.h"
#include "krait/ops/activation.h"
#include "modules/initialize.h"
#include "modules/step.h"

namespace krait {

GatedMlp::GatedMlp(std::int64_t d_model, std::int64_t hidden_features, bool bias, std::int64_t multiple_of) {
  require(d_model > 0 && hidden_features >= 0 && multiple_of > 0, "GatedMLP: d_model ", d_model,
          ", hidden_features ", hidden_features, ", multiple_of ", multiple_of);
  const std::int64_t wanted = hidden_features > 0 ? hidden_features : 8 * d_model / 3;
  const std::int64_t hidden = (wanted + multiple_of - 1) / multiple_of * multiple_of;
  fc1_ = {.in = d_model, .out = 2 * hidden, .has_bias = bias};
  fc2_ = {.in = hidden, .out = d_model, .has_bias = bias};
}

Tensor GatedMlp::forward(Context& ctx, const Tensor& x, Tape::Frame* frame, Tensor* sum) const {
  const Tensor projected = fc1_(ctx, x);
  const Tensor y = projected.slice(-1, 0, fc2_.in);
  const Tensor gate = projected.slice(-1, fc2_.in, 2 * fc2_.in);
  const Tensor gated = gated_silu(ctx, {.x = y, .gate = gate});
  if (frame != nullptr) {
    frame->keep("x", x);
    frame->keep("projected", projected);
    frame->keep("gated", gated);
  }
  return fc2_(ctx, gated, sum, frame != nullptr);
}

Tensor GatedMlp::step(Context& ctx, const StepInput& input) const {
  const Tensor projected = project(ctx, input, fc1_).out;
  return fc2_(ctx, gated_silu(ctx, {.x = projected.slice(-1, 0, fc2_.in),
                                    .gate = projected.slice(-1, fc2_.in, 2 * fc2_.in)}));
}

Tensor GatedMlp::backward(Context& ctx, const Tensor& dout, const Tape::Frame& frame) const {
  const Tensor& projected = frame["projected"];
  const Tensor dgated = fc2_.backward(ctx, frame["gated"], dout);
  const Tensor dprojected = ctx.empty(projected.shape(), projected.dtype());
  gated_silu_backward(ctx, {.x = projected.slice(-1, 0, fc2_.in),
                            .gate = projected.slice(-1, fc2_.in, 2 * fc2_.in),
                            .dout = dgated,
                            .dx = dprojected.slice(-1, 0, fc2_.in),
                            .dgate = dprojected.slice(-1, fc2_.in, 2 * fc2_.in)});
  return fc1_.backward(ctx, frame["x"], dprojected);
}

void GatedMlp::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  fc1_.visit(prefix + ".fc1", visitor);
  fc2_.visit(prefix + ".fc2", visitor);
}

void GatedMlp::initialize(Rng& rng) {
  krait::initialize(fc1_, rng);
  krait::initialize(fc2_, rng);
}

}  // namespace krait
