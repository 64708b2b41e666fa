#include "krait/modules/block.h"

#include "krait/ops/norm.h"
#include "modules/initialize.h"
#include "modules/step.h"

namespace krait {

Block::Block(std::unique_ptr<Mixer> mixer, NormLayer norm, std::optional<GatedMlp> mlp)
    : norm_(norm), mixer_(std::move(mixer)), norm2_(std::move(norm)), mlp_(std::move(mlp)) {}

Tensor add_norm(Context& ctx, const NormLayer& layer, ResidualStream& stream, bool keep) {
  const NormKind kind = layer.rms ? NormKind::rms : NormKind::layer;
  if (!stream.hidden)
    return norm(ctx, kind,
                {.x = stream.residual,
                 .weight = layer.weight,
                 .bias = layer.bias,
                 .eps = layer.eps,
                 .out = ctx.empty(stream.residual.shape(), stream.dtype)})
        .out;
  const NormResult result = norm(ctx, kind,
                                 {.x = stream.hidden,
                                  .weight = layer.weight,
                                  .bias = layer.bias,
                                  .residual = stream.residual,
                                  .eps = layer.eps,
                                  .prenorm = true,
                                  .residual_in_fp32 = true,
                                  .residual_out = keep ? Tensor() : stream.residual});
  stream.residual = result.residual;
  stream.hidden = {};
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
  ResidualStream stream{input.hidden, *input.residual, input.hidden.dtype()};
  const Tensor normed = add_norm(ctx, *input.norm, stream);
  *input.residual = stream.residual;
  return forward(ctx, normed, batch, layer);
}

namespace {

// Places of dropout within one pass; 0 is the embedding's.
std::uint64_t mixer_site(int layer) { return 1 + 2 * static_cast<std::uint64_t>(layer); }
std::uint64_t mlp_site(int layer) { return 2 + 2 * static_cast<std::uint64_t>(layer); }

}  // namespace

void Block::run(Context& ctx, ResidualStream& stream, const Batch& batch, int layer, Tape* tape) const {
  const bool keep = tape != nullptr;
  if (!keep && batch.is_step()) {
    stream.hidden = mixer_->step(ctx, {stream.hidden, &norm_, &stream.residual}, batch, layer);
    if (mlp_) stream.hidden = mlp_->step(ctx, {stream.hidden, &norm2_, &stream.residual});
    return;
  }
  // A GPU's products add to the residual as they end, which spares the norm two passes over it. Dropout comes
  // in between.
  const bool adds = ctx.on_gpu() && (!keep || tape->options().dropout == 0.0);
  Tensor* const sum = adds ? &stream.residual : nullptr;
  const Tensor normed = add_norm(ctx, norm_, stream, keep);
  if (keep) tape->frame(layer, "block").keep("residual", stream.residual);
  stream.hidden = mixer_->forward(ctx, normed, batch, layer, tape, sum);
  if (keep && stream.hidden) tape->dropout(ctx, stream.hidden, mixer_site(layer));
  if (!mlp_) return;
  const Tensor normed2 = add_norm(ctx, norm2_, stream, keep);
  if (keep) tape->frame(layer, "block").keep("residual2", stream.residual);
  stream.hidden = mlp_->forward(ctx, normed2, keep ? &tape->frame(layer, "mlp") : nullptr, sum);
  if (keep && stream.hidden) tape->dropout(ctx, stream.hidden, mlp_site(layer));
}

void Block::forward(Context& ctx, ResidualStream& stream, const Batch& batch, int layer, Tape* tape) const {
  if (tape == nullptr || tape->options().recompute == Recompute::none)
    return run(ctx, stream, batch, layer, tape);
  const ResidualStream before = stream;
  run(ctx, stream, batch, layer, tape);
  for (const char* module : {"block", "mixer", "mlp"}) tape->drop(layer, module);
  Tape::Frame& frame = tape->frame(layer, "input");
  if (before.hidden) frame.keep("hidden", before.hidden);
  if (before.residual) frame.keep("residual", before.residual);
}

void Block::backward(Context& ctx, const StreamGradient& dsum, const Batch& batch, int layer,
                     Tape& tape) const {
  if (tape.options().recompute == Recompute::block) {
    const Tape::Frame& input = tape.frame(layer, "input");
    const auto kept = [&](const char* name) { return input.has(name) ? input[name] : Tensor(); };
    ResidualStream stream{kept("hidden"), kept("residual"), dsum.for_products().dtype()};
    tape.set_recomputing(true);
    run(ctx, stream, batch, layer, &tape);
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
