// Block: Add -> Norm -> Mixer (-> Add -> Norm2 -> GatedMlp). The residual travels beside the hidden states,
// in f32, so that each addition is fused with the norm that follows it, or with the product in front of it.
#pragma once

#include <memory>
#include <optional>

#include "krait/modules/gated_mlp.h"
#include "krait/modules/mixer.h"

namespace krait {

// The gradient of the residual stream (T, d_model), in f32, and where the activations are narrower once more
// in their dtype, which is how products read it.
struct StreamGradient {
  Tensor sum;
  Tensor rounded;  // absent: the activations are f32

  [[nodiscard]] const Tensor& for_products() const { return rounded ? rounded : sum; }
};

// What travels from block to block, (T, d_model) each.
struct ResidualStream {
  Tensor hidden;    // what the block before gave, not yet added; absent where the residual has it
  Tensor residual;  // in f32; absent in front of the first block
  DType dtype;      // of activations
};

class Block {
 public:
  Block(std::unique_ptr<Mixer> mixer, NormLayer norm, std::optional<GatedMlp> mlp = std::nullopt);

  // Moves the stream on. Its residual is updated in place; with a tape, replaced.
  void forward(Context& ctx, ResidualStream& stream, const Batch& batch, int layer,
               Tape* tape = nullptr) const;
  // On entry `dsum` is the gradient of the sum of the stream that forward left; on return, in place, that of
  // the one that it was given. Drops the layer's frames.
  void backward(Context& ctx, const StreamGradient& dsum, const Batch& batch, int layer, Tape& tape) const;
  void visit(const std::string& prefix, const ParameterVisitor& visitor);
  void initialize(Rng& rng);
  [[nodiscard]] const NormLayer& norm() const { return norm_; }
  [[nodiscard]] bool has_mlp() const { return mlp_.has_value(); }
  [[nodiscard]] Mixer& mixer() { return *mixer_; }
  [[nodiscard]] const Mixer& mixer() const { return *mixer_; }

 private:
  void run(Context& ctx, ResidualStream& stream, const Batch& batch, int layer, Tape* tape) const;

  NormLayer norm_;
  std::unique_ptr<Mixer> mixer_;
  NormLayer norm2_;
  std::optional<GatedMlp> mlp_;
};

// r = hidden + residual, which the residual becomes: in place where it is given and `keep` does not ask for a
// new one. Returns norm(r).
Tensor add_norm(Context& ctx, const NormLayer& layer, ResidualStream& stream, bool keep = false);
// dnormed is the gradient of norm(r), `past` the one that reaches r past the norm, or absent. `dsum`, which
// may be `past`, becomes the whole of it.
void add_norm_backward(Context& ctx, const NormLayer& layer, const Tensor& r, const Tensor& dnormed,
                       const Tensor& past, const StreamGradient& dsum);

}  // namespace krait
