#include "krait/modules/parameter.h"

#include "krait/ops/linear.h"

namespace krait {

Tensor LinearLayer::operator()(Context& ctx, const Tensor& x, Tensor* sum, bool keep) const {
  if (sum == nullptr) return linear(ctx, {.x = x, .weight = weight, .bias = bias});
  *sum = linear(ctx, {.x = x, .weight = weight, .bias = bias, .out = keep ? Tensor() : *sum, .addend = *sum});
  return {};
}

Tensor LinearLayer::backward(Context& ctx, const Tensor& x, const Tensor& dout) const {
  const Tensor dx = ctx.empty(x.shape(), x.dtype());
  linear_backward(ctx,
                  {.x = x, .weight = weight, .dout = dout, .dx = dx, .dweight = dweight, .dbias = dbias});
  return dx;
}

void LinearLayer::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  visitor({.name = prefix + ".weight",
           .shape = {out, in},
           .tensor = weight,
           .gradient = dweight,
           .kind = ParameterKind::matrix});
  if (has_bias)
    visitor({.name = prefix + ".bias",
             .shape = {out},
             .tensor = bias,
             .gradient = dbias,
             .no_weight_decay = true});
}

void ConvLayer::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  visitor(
      {.name = prefix + ".weight", .shape = {channels, 1, d_conv}, .tensor = weight, .gradient = dweight});
  if (has_bias)
    visitor({.name = prefix + ".bias",
             .shape = {channels},
             .tensor = bias,
             .gradient = dbias,
             .no_weight_decay = true});
}

void NormLayer::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  visitor({.name = prefix + ".weight",
           .shape = {channels},
           .tensor = weight,
           .gradient = dweight,
           .no_weight_decay = true});
  if (!rms)
    visitor({.name = prefix + ".bias",
             .shape = {channels},
             .tensor = bias,
             .gradient = dbias,
             .no_weight_decay = true});
}

}  // namespace krait
