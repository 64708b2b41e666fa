#include "krait/modules/block.h"

#include "krait/ops/norm.h"
#include "modules/initialize.h"

namespace krait {

Block::Block(std::unique_ptr<Mixer> mixer, NormLayer norm, std::optional<GatedMlp> mlp)
    : norm_(norm), mixer_(std::move(mixer)), norm2_(std::move(norm)), mlp_(std::move(mlp)) {}

Tensor add_norm(Context& ctx, const NormLayer& layer, const Tensor& hidden, Tensor& residual) {
  const NormResult result = norm(ctx, layer.rms ? NormKind::rms : NormKind::layer,
                                 {.x = hidden,
                                  .weight = layer.weight,
                                  .bias = layer.bias,
                                  .residual = residual,
                                  .eps = layer.eps,
                                  .prenorm = true,
                                  .residual_in_fp32 = true,
                                  .residual_out = residual});
  residual = result.residual;
  return result.out;
}

Tensor Block::forward(Context& ctx, const Tensor& hidden, Tensor& residual, const Batch& batch,
                      int layer) const {
  Tensor mixed = mixer_->forward(ctx, add_norm(ctx, norm_, hidden, residual), batch, layer);
  if (!mlp_) return mixed;
  return mlp_->forward(ctx, add_norm(ctx, norm2_, mixed, residual));
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
