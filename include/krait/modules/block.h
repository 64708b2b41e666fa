// Block: Add -> Norm -> Mixer (-> Add -> Norm2 -> GatedMlp). The residual travels beside the hidden states,
// in f32, so that each addition is fused with the norm that follows it.
#pragma once

#include <memory>
#include <optional>

#include "krait/modules/gated_mlp.h"
#include "krait/modules/mixer.h"

namespace krait {

class Block {
 public:
  Block(std::unique_ptr<Mixer> mixer, NormLayer norm, std::optional<GatedMlp> mlp = std::nullopt);

  // hidden (T, d_model); residual (T, d_model) f32, absent before the first block, updated in place.
  // Returns the block's own output, not yet added to the residual.
  Tensor forward(Context& ctx, const Tensor& hidden, Tensor& residual, const Batch& batch, int layer) const;
  void visit(const std::string& prefix, const ParameterVisitor& visitor);
  void initialize(Rng& rng);
  [[nodiscard]] Mixer& mixer() { return *mixer_; }
  [[nodiscard]] const Mixer& mixer() const { return *mixer_; }

 private:
  NormLayer norm_;
  std::unique_ptr<Mixer> mixer_;
  NormLayer norm2_;
  std::optional<GatedMlp> mlp_;
};

// r = hidden + residual (in place in `residual`, which it becomes where absent); returns norm(r).
Tensor add_norm(Context& ctx, const NormLayer& layer, const Tensor& hidden, Tensor& residual);

}  // namespace krait
