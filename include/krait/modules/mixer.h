// Mixer: the part of a block that looks along the sequence. Mamba1, Mamba2 and MHA are mixers.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/core/tensor.h"
#include "krait/modules/batch.h"
#include "krait/modules/parameter.h"
#include "krait/modules/state.h"
#include "krait/modules/tape.h"
#include "krait/ops/decode_step.h"

namespace krait {

// What a module that takes one token of each sequence starts from: `hidden` (n, d_model) as it is, or
// norm(hidden + residual), in which case the sum becomes the residual (f32, absent at first).
struct StepInput {
  Tensor hidden;
  const NormLayer* norm = nullptr;
  Tensor* residual = nullptr;
};

class Mixer {
 public:
  virtual ~Mixer() = default;
  // hidden (T, d_model) of the batch's packed tokens -> (T, d_model). Reads and advances the batch's
  // states of layer `layer`. Prefill, step, every split of the two and training are this one function; with
  // a tape it keeps there what backward reads. Where `sum` (T, d_model) is given the output is added to it,
  // rounded to its dtype alone (in place, with a tape into a new tensor), and nothing is returned; not in a
  // step.
  virtual Tensor forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer,
                         Tape* tape = nullptr, Tensor* sum = nullptr) const = 0;
  // forward for a batch that is_step() of an input that may still want its norm, which a mixer may compute
  // together with its first product. As it is here: the norm, then forward.
  virtual Tensor step(Context& ctx, const StepInput& input, const Batch& batch, int layer) const;
  // dout (T, d_model) -> the gradient of hidden. Adds to the gradients of parameters that have one.
  virtual Tensor backward(Context& ctx, const Tensor& dout, const Batch& batch, int layer,
                          Tape& tape) const = 0;
  // What decode_step takes of a layer with this mixer: its own part of `layer`, and what all layers share.
  // False, with both in any state, where the kernel is not made for it.
  virtual bool describe(DecodeModel& /*model*/, DecodeLayer& /*layer*/) const { return false; }
  [[nodiscard]] virtual LayerStateShape state_shape() const = 0;
  virtual void visit(const std::string& prefix, const ParameterVisitor& visitor) = 0;
  // Fills every parameter as the field initialises it.
  virtual void initialize(Rng& rng) = 0;
  // Recomputes what is derived from parameters (A = -exp(A_log)); after loading and after each update.
  virtual void prepare(Context& /*ctx*/) {}
  [[nodiscard]] virtual std::string_view kind() const = 0;  // "Mamba1", "Mamba2", "MHA"
};

}  // namespace krait
