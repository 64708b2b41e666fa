// Parameters: modules show each of theirs to a visitor, by the name that checkpoints use. Loading,
// initialisation, saving, counting and optimisation are visitors.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

enum class ParameterKind : std::uint8_t {
  matrix,  // multiplied with activations; kept in the checkpoint's dtype
  small,   // norms, biases, convolutions, A_log, D, dt_bias: f32
};

struct Parameter {
  std::string name;  // "layers.3.mixer.in_proj.weight"
  Dims shape;
  Tensor& tensor;
  Tensor& gradient;  // f32, added to by backward; absent: the parameter is not trained
  ParameterKind kind = ParameterKind::small;
  bool no_weight_decay = false;
};

using ParameterVisitor = std::function<void(const Parameter&)>;

// An affine map, weight (out, in) and bias (out) where has_bias.
struct LinearLayer {
  std::int64_t in = 0;
  std::int64_t out = 0;
  bool has_bias = false;
  Tensor weight{};
  Tensor bias{};
  Tensor dweight{};
  Tensor dbias{};

  // x (..., in) -> (..., out). Where `sum` (..., out) is given that is added to it, in place, or into a new
  // tensor that it becomes where the old one is kept, and nothing is returned.
  Tensor operator()(Context& ctx, const Tensor& x, Tensor* sum = nullptr, bool keep = false) const;
  // Adds to dweight and dbias where they are present; returns dx (..., in).
  Tensor backward(Context& ctx, const Tensor& x, const Tensor& dout) const;
  void visit(const std::string& prefix, const ParameterVisitor& visitor);
};

// The short causal convolution in front of an SSM or attention: weight (channels, 1, d_conv).
struct ConvLayer {
  std::int64_t channels = 0;
  std::int64_t d_conv = 0;
  bool has_bias = true;
  Tensor weight{};
  Tensor bias{};
  Tensor dweight{};
  Tensor dbias{};

  void visit(const std::string& prefix, const ParameterVisitor& visitor);
};

// RMSNorm or LayerNorm with weight (and bias).
struct NormLayer {
  std::int64_t channels = 0;
  bool rms = true;
  double eps = 1e-5;
  Tensor weight{};
  Tensor bias{};  // LayerNorm only
  Tensor dweight{};
  Tensor dbias{};

  void visit(const std::string& prefix, const ParameterVisitor& visitor);
};

}  // namespace krait
