#include "krait/modules/block.h"

#include "krait/ops/norm.h"
#include "modules/initialize.h"
#include "modules/step.h"

namespace krait {

Block::Block(std::unique_ptr<Mixer> mixer, NormLayer norm, std::optional<GatedMlp> mlp)
    : norm_(norm), mixer_(std::move(mixer)), norm2_(std::move(norm)), mlp_(std::move(mlp)) {}

Tensor add_norm(Context& ctx, const NormLayer& layer, const Tensor& hidden, Tensor& residual, bool keep) {
  const NormResult result = norm(ctx, layer.rms ? NormKind::rms : NormKind::layer,
                                 {.x = hidden,
                                  .weight = layer.weight,
                                  .bias = layer.bias,
                                  .residual = residual,
                                  .eps = layer.eps,
                                  .prenorm = true,
                                  .residual_in_fp32 = true,
                                  .residual_out = keep ? Tensor() : residual});
  residual = result.residual;
  return result.out;
}

void add_norm_backward(Context& ctx, const NormLayer& layer, const Tensor& r, const Tensor& dnormed,
                       const Tensor& past, const StreamGradient& dsum) {
  norm_backward(ctx, layer.rms ? NormKind::rms : NormKind::layer,
                {.x = r,
                 .weight = layer.weight,
                 .eps = layer.eps,
                 .dout = dnormed,
                 .dresidual = past,
                 .dx = dsum.sum,
                 .dx_rounded = dsum.rounded,
                 .dweight = layer.dweight,
                 .dbias = layer.dbias});
}

Tensor Mixer::step(Context& ctx, const StepInput& input, const Batch& batch, int layer) const {
  if (input.norm == nullptr) return forward(ctx, input.hidden, batch, layer);
  return forward(ctx, add_norm(ctx, *input.norm, input.hidden, *input.residual), batch, layer);
}

namespace {

// Places of dropout within one pass; 0 is the embedding's.
std::uint64_t mixer_site(int layer) { return 1 + 2 * static_cast<std::uint64_t>(layer); }
std::uint64_t mlp_site(int layer) { return 2 + 2 * static_cast<std::uint64_t>(layer); }

}  // namespace

Tensor Block::run(Context& ctx, const Tensor& hidden, Tensor& residual, const Batch& batch, int layer,
                  Tape* tape) const {
  const bool keep = tape != nullptr;
  if (!keep && batch.is_step()) {
    const Tensor mixed = mixer_->step(ctx, {hidden, &norm_, &residual}, batch, layer);
    return mlp_ ? mlp_->step(ctx, {mixed, &norm2_, &residual}) : mixed;
  }
  const Tensor normed = add_norm(ctx, norm_, hidden, residual, keep);
  if (keep) tape->frame(layer, "block").keep("residual", residual);
  const Tensor mixed = mixer_->forward(ctx, normed, batch, layer, tape);
  if (keep) tape->dropout(ctx, mixed, mixer_site(layer));
  if (!mlp_) return mixed;
  const Tensor normed2 = add_norm(ctx, norm2_, mixed, residual, keep);
  if (keep) tape->frame(layer, "block").keep("residual2", residual);
  const Tensor out = mlp_->forward(ctx, normed2, keep ? &tape->frame(layer, "mlp") : nullptr);
  if (keep) tape->dropout(ctx, out, mlp_site(layer));
  return out;
}

Tensor Block::forward(Context& ctx, const Tensor& hidden, Tensor& residual, const Batch& batch, int layer,
                      Tape* tape) const {
  if (tape == nullptr || tape->options().recompute == Recompute::none)
    return run(ctx, hidden, residual, batch, layer, tape);
  const Tensor before = residual;
  Tensor out = run(ctx, hidden, residual, batch, layer, tape);
  for (const char* module : {"block", "mixer", "mlp"}) tape->drop(layer, module);
  Tape::Frame& frame = tape->frame(layer, "input");
  frame.keep("hidden", hidden);
  if (before) frame.keep("residual", before);
  return out;
}

void Block::backward(Context& ctx, const StreamGradient& dsum, const Batch& batch, int layer,
                     Tape& tape) const {
  if (tape.options().recompute == Recompute::block) {
    const Tape::Frame& input = tape.frame(layer, "input");
    Tensor residual = input.has("residual") ? input["residual"] : Tensor();
    tape.set_recomputing(true);
    run(ctx, input["hidden"], residual, batch, layer, &tape);
    tape.set_recomputing(false);
    tape.measure();
  }
  // With dropout a branch sees another gradient than the residual does.
  const auto branch = [&](std::uint64_t site) {
    if (tape.options().dropout == 0.0) return dsum.for_products();
    const Tensor copy = ctx.clone(dsum.sum);
    tape.dropout(ctx, copy, site);
    return copy;
  };
  const Tape::Frame& frame = tape.frame(layer, "block");
  if (mlp_) {
    const Tensor dnormed2 = mlp_->backward(ctx, branch(mlp_site(layer)), tape.frame(layer, "mlp"));
    add_norm_backward(ctx, norm2_, frame["residual2"], dnormed2, dsum.sum, dsum);
  }
  const Tensor dnormed = mixer_->backward(ctx, branch(mixer_site(layer)), batch, layer, tape);
  add_norm_backward(ctx, norm_, frame["residual"], dnormed, dsum.sum, dsum);
  tape.drop(layer);
}

void Block::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  norm_.visit(prefix + ".norm", visitor);
  mixer_->visit(prefix + ".mixer", visitor);
  if (!mlp_) return;
  norm2_.visit(prefix + ".norm2", visitor);
  mlp_->visit(prefix + ".mlp", visitor);
}

void Block::initialize(Rng& rng) {
  krait::initialize(norm_);
  mixer_->initialize(rng);
  if (!mlp_) return;
  krait::initialize(norm2_);
  mlp_->initialize(rng);
}

}  // namespace krait
