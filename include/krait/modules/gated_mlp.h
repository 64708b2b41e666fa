// GatedMLP: fc2(y * silu(gate)), [y, gate] = fc1(x) (Shazeer 2020, "GLU variants improve Transformer").
#pragma once

#include <cstdint>

#include "krait/core/random.h"
#include "krait/modules/mixer.h"
#include "krait/modules/parameter.h"
#include "krait/modules/tape.h"

namespace krait {

class GatedMlp {
 public:
  // hidden_features 0: int(8 d_model / 3); rounded up to a multiple of multiple_of.
  explicit GatedMlp(std::int64_t d_model, std::int64_t hidden_features = 0, bool bias = false,
                    std::int64_t multiple_of = 128);

  // x (..., d_model) -> (..., d_model); with a frame, keeps there what backward reads. `sum` as in Mixer.
  Tensor forward(Context& ctx, const Tensor& x, Tape::Frame* frame = nullptr, Tensor* sum = nullptr) const;
  // forward of an input that may still want its norm.
  Tensor step(Context& ctx, const StepInput& input) const;
  // dout (..., d_model) -> the gradient of x. Adds to the gradients of parameters that have one.
  Tensor backward(Context& ctx, const Tensor& dout, const Tape::Frame& frame) const;
  void visit(const std::string& prefix, const ParameterVisitor& visitor);
  void initialize(Rng& rng);
  [[nodiscard]] std::int64_t hidden_features() const { return fc2_.in; }

 private:
  LinearLayer fc1_;  // (2 hidden_features, d_model)
  LinearLayer fc2_;  // (d_model, hidden_features)
};

}  // namespace krait
