#include "krait/ops/projection.h"

#include "ffi/contexts.h"
#include "ffi/convert.h"
#include "ffi/words.h"

namespace krait::ffi {
namespace {

// The operator makes what it returns beside out; a few rows.
void into(Context& ctx, const char* name, const Tensor& result, const Tensor& destination) {
  if (!destination) return;
  require(static_cast<bool>(result), "[projection] ", name, " is wanted, but there is none");
  require(destination.shape() == result.shape(), "[projection] ", name, " has shape ", destination.shape(),
          ", expected ", result.shape());
  ctx.copy(result, destination);
}

void projection(Given x, const Word& kind, Given norm_weight, Given norm_bias, Given residual, Given z,
                double eps, std::int64_t group_size, bool norm_before_gate, Given weight, Given bias,
                Given conv_state, Given conv_weight, Given conv_bias, Given conv_state_indices,
                std::int64_t conv_first, const Word& activation, Given out, Given residual_out,
                Given convolved) {
  Operands of("projection");
  const ProjectionArgs args{.x = of("x", x),
                            .input = {.norm = choice<ProjectionNorm>("projection", "norm", kind,
                                                                     {{"none", ProjectionNorm::none},
                                                                      {"rms", ProjectionNorm::rms},
                                                                      {"layer", ProjectionNorm::layer}}),
                                      .weight = of("norm_weight", norm_weight),
                                      .bias = of("norm_bias", norm_bias),
                                      .residual = of("residual", residual),
                                      .z = of("z", z),
                                      .eps = eps,
                                      .group_size = group_size,
                                      .norm_before_gate = norm_before_gate,
                                      .return_residual = static_cast<bool>(residual_out)},
                            .weight = of("weight", weight),
                            .bias = of("bias", bias),
                            .out = of("out", out),
                            .conv = {.conv_state = of("conv_state", conv_state),
                                     .weight = of("conv_weight", conv_weight),
                                     .bias = of("conv_bias", conv_bias),
                                     .conv_state_indices = of("conv_state_indices", conv_state_indices),
                                     .first = conv_first,
                                     .activation = activation_of("projection", activation)}};
  const Tensor to_residual = of("residual_out", residual_out);
  const Tensor to_convolved = of("convolved", convolved);
  const Lease ctx(of.device());
  const ProjectionResult result = krait::projection(*ctx, args);
  into(*ctx, "residual_out", result.residual, to_residual);
  into(*ctx, "convolved", result.convolved, to_convolved);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(projection, krait::ffi::projection)
