#include "core/build.h"
#include "krait/ops/causal_conv1d.h"
#include "ops/causal_conv1d/conv.h"
#include "ops/overlap.h"

namespace krait {
namespace {

constexpr std::string_view kOp = "causal_conv1d_backward";

// A gradient, or the place of one.
void require_gradient(std::string_view name, const Tensor& t, const Tensor& x, const Dims& shape,
                      std::string_view meaning) {
  if (!t) return;
  conv_detail::require_float(kOp, name, t, x);
  require(t.shape() == shape, "[causal_conv1d_backward] ", name, " has shape ", t.shape(), ", expected ",
          shape, ": ", meaning);
}

void require_sum(std::string_view name, const Tensor& t, const Tensor& x, const Dims& shape,
                 std::string_view meaning) {
  require_gradient(name, t, x, shape, meaning);
  require(!t || t.dtype() == DType::f32 || t.dtype() == DType::f64, "[causal_conv1d_backward] ", name,
          " has dtype ", t.dtype(), ", expected f32: it is added to");
}

}  // namespace

void causal_conv1d_backward(Context& ctx, const CausalConv1dBackwardArgs& args) {
  using namespace conv_detail;
  const Tensor& x = args.x;
  require_on_device(ctx, kOp,
                    {{"x", x},
                     {"weight", args.weight},
                     {"bias", args.bias},
                     {"initial_states", args.initial_states},
                     {"dout", args.dout},
                     {"dfinal_states", args.dfinal_states},
                     {"dx", args.dx},
                     {"dweight", args.dweight},
                     {"dbias", args.dbias},
                     {"dinitial_states", args.dinitial_states}});
  const Tensor seq_idx = ctx.to_host(args.seq_idx);
  const Tensor cu_seqlens = ctx.to_host(args.cu_seqlens);
  const Dims state_shape =
      validate_inputs(kOp, x, args.weight, args.bias, args.initial_states, seq_idx, cu_seqlens, {});
  require(args.dout.defined(), "[causal_conv1d_backward] dout is missing");
  require_gradient("dout", args.dout, x, x.shape(), "that of x");
  require_gradient("dfinal_states", args.dfinal_states, x, state_shape, "that of the final states");
  require_gradient("dx", args.dx, x, x.shape(), "that of x");
  require_gradient("dinitial_states", args.dinitial_states, x, state_shape, "that of the initial states");
  require_sum("dweight", args.dweight, x, args.weight.shape(), "that of weight");
  require_sum("dbias", args.dbias, x, {x.size(1)}, "one value for each channel");
  require_apart(kOp, "dx", args.dx, "dout", args.dout, true);
  require_apart(kOp, "dx", args.dx, "x", x);
  require_apart(kOp, "dx", args.dx, "initial_states", args.initial_states);
  require_apart(kOp, "dx", args.dx, "dfinal_states", args.dfinal_states);
  require_apart(kOp, "dinitial_states", args.dinitial_states, "dfinal_states", args.dfinal_states, true);
  require_apart(kOp, "dinitial_states", args.dinitial_states, "initial_states", args.initial_states);
  require_apart(kOp, "dinitial_states", args.dinitial_states, "x", x);
  require_apart(kOp, "dinitial_states", args.dinitial_states, "dout", args.dout);
  require_apart(kOp, "dinitial_states", args.dinitial_states, "dx", args.dx);
  require_apart(kOp, "dweight", args.dweight, "dbias", args.dbias);
  const bool reference = takes_reference(kOp, ctx, args.path, x);
  ctx.set_backend(kOp, ctx.on_gpu() ? "cuda"
                       : reference  ? "reference"
                                    : concat("simd (", simd_target(), ")"));
  if (!args.dx && !args.dinitial_states && !args.dweight && !args.dbias) return;

  const TokenRuns runs = cut_into_runs(x.size(0), x.size(2), seq_idx, cu_seqlens, {}, false);
  const Backward backward{.x = x,
                          .weight = args.weight,
                          .bias = args.bias,
                          .initial_states = args.initial_states,
                          .activation = args.activation,
                          .runs = &runs,
                          .dout = args.dout,
                          .dfinal_states = args.dfinal_states,
                          .dx = args.dx,
                          .dweight = args.dweight,
                          .dbias = args.dbias,
                          .dinitial_states = args.dinitial_states};
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) return backward_cuda(ctx, backward, !seq_idx && !cu_seqlens);
  }
  if (reference)
    backward_reference(ctx, backward);
  else
    backward_simd(ctx, backward);
  if (args.dx)
    for (const auto& [row, position] : runs.padding) args.dx.select(0, row).select(1, position).fill(0.0);
}

}  // namespace krait
