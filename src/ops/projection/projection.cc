#include "krait/ops/projection.h"

#include "core/build.h"
#include "krait/core/error.h"
#include "krait/ops/linear.h"
#include "krait/ops/norm.h"
#include "ops/projection/kernels.h"

namespace krait {
namespace {

void validate(const ProjectionArgs& args) {
  require(args.x && args.x.ndim() == 2, "[projection] x has shape ", args.x ? args.x.shape() : Dims{},
          ", expected (B, in)");
  require(args.weight && args.weight.ndim() == 2 && args.weight.size(1) == args.x.size(1),
          "[projection] weight has shape ", args.weight ? args.weight.shape() : Dims{}, ", expected (out, ",
          args.x.size(1), ")");
  const ProjectionInput& in = args.input;
  const bool normed = in.norm != ProjectionNorm::none;
  require(normed || (!in.weight && !in.bias && !in.residual && !in.z && !in.return_residual),
          "[projection] a norm's weight, bias, residual or gate is given, but no norm");
  require(!in.z || (!in.residual && !in.return_residual), "[projection] a gate is given beside a residual");
  if (const ProjectionConv& conv = args.conv; conv.conv_state) {
    require(conv.weight && conv.weight.ndim() == 2, "[projection] conv.weight has shape ",
            conv.weight ? conv.weight.shape() : Dims{}, ", expected (D, K)");
    require(conv.first >= 0 && conv.first + conv.weight.size(0) <= args.weight.size(0),
            "[projection] the convolution begins at column ", conv.first, " and has ", conv.weight.size(0),
            " channels, of ", args.weight.size(0), " columns");
  }
}

}  // namespace

ProjectionResult projection(Context& ctx, const ProjectionArgs& args) {
  validate(args);
  const ProjectionInput& in = args.input;
  const ProjectionConv& conv = args.conv;
  const std::int64_t rows = args.x.size(0);
  ProjectionResult result{.out = args.out};
  if constexpr (kWithCuda) {
    if (ctx.on_gpu() && rows >= 1 && rows <= kMostProjectionRows) {
      ProjectionResult whole = result;
      if (!whole.out) whole.out = ctx.empty({rows, args.weight.size(0)}, args.x.dtype());
      if (in.return_residual) whole.residual = ctx.empty(args.x.shape());
      if (conv.conv_state) whole.convolved = ctx.empty({rows, conv.weight.size(0)}, whole.out.dtype());
      if (projection_detail::fused(ctx, args, whole)) {
        ctx.set_backend("projection", "cuda");
        return whole;
      }
    }
  }
  Tensor x = args.x;
  if (in.norm != ProjectionNorm::none) {
    const NormResult normed = norm(ctx, in.norm == ProjectionNorm::rms ? NormKind::rms : NormKind::layer,
                                   {.x = x,
                                    .weight = in.weight,
                                    .bias = in.bias,
                                    .residual = in.residual,
                                    .z = in.z,
                                    .eps = in.eps,
                                    .group_size = in.group_size,
                                    .norm_before_gate = in.norm_before_gate,
                                    .prenorm = in.return_residual,
                                    .residual_in_fp32 = in.return_residual});
    x = normed.out;
    result.residual = normed.residual;
  }
  result.out = linear(ctx, {.x = x, .weight = args.weight, .bias = args.bias, .out = args.out});
  if (conv.conv_state)
    result.convolved =
        causal_conv1d_update(ctx, {.x = result.out.slice(1, conv.first, conv.first + conv.weight.size(0)),
                                   .conv_state = conv.conv_state,
                                   .weight = conv.weight,
                                   .bias = conv.bias,
                                   .activation = conv.activation,
                                   .conv_state_indices = conv.conv_state_indices});
  ctx.set_backend("projection", "norm, linear, causal_conv1d_update");
  return result;
}

}  // namespace krait
