#include "krait/ops/rotary.h"

#include <algorithm>
#include <cmath>

#include "core/build.h"
#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/rotary/kernels.h"

namespace krait {
namespace {

using rotary_kernels::Problem;

void validate(const RotaryArgs& args) {
  const Tensor& x = args.x;
  require(x.defined() && x.ndim() == 3, "[rotary] x has shape ", x.shape(), ", expected (T, H, head_dim)");
  require(is_float(x.dtype()), "[rotary] x has dtype ", x.dtype(), ", expected f32, f64, bf16 or f16");
  require(args.positions.defined() && args.positions.shape() == Dims{x.size(0)},
          "[rotary] positions has shape ", args.positions.shape(), ", expected ", Dims{x.size(0)},
          ": one for each token");
  require(args.positions.dtype() == DType::i64 || args.positions.dtype() == DType::i32,
          "[rotary] positions has dtype ", args.positions.dtype(), ", expected i64 or i32");
  require(args.dim >= 0 && args.dim <= x.size(2) && args.dim % 2 == 0, "[rotary] dim is ", args.dim,
          ", expected an even number up to head_dim ", x.size(2));
  require(args.base > 0 && std::isfinite(args.base), "[rotary] base is ", args.base,
          ", expected a positive number");
}

std::vector<double> read_positions(const Tensor& positions, bool inverse) {
  // At this magnitude f64 still holds an angle to 1e-6.
  constexpr std::int64_t kLimit = std::int64_t{1} << 32;
  std::vector<double> result(static_cast<std::size_t>(positions.numel()));
  const std::int64_t stride = positions.stride(0);
  for (std::size_t i = 0; i < result.size(); ++i) {
    const std::int64_t at = static_cast<std::int64_t>(i) * stride;
    const std::int64_t position = positions.dtype() == DType::i64 ? positions.data<std::int64_t>()[at]
                                                                  : positions.data<std::int32_t>()[at];
    require(position > -kLimit && position < kLimit, "[rotary] position ", i, " is ", position,
            ", expected a magnitude below 2^32");
    result[i] = static_cast<double>(inverse ? -position : position);
  }
  return result;
}

std::vector<double> frequencies(std::int64_t dim, double base) {
  std::vector<double> result(static_cast<std::size_t>(dim / 2));
  for (std::size_t i = 0; i < result.size(); ++i)
    result[i] = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
  return result;
}

bool use_simd(const Context& ctx, const RotaryArgs& args) {
  const bool wide = args.x.dtype() == DType::f64;
  if (args.path == RotaryPath::simd)
    require(!wide, "[rotary] the simd path has no f64, expected f32, bf16 or f16");
  return args.path == RotaryPath::simd || (args.path == RotaryPath::automatic && !ctx.reference() && !wide);
}

}  // namespace

void rotary_embedding(Context& ctx, const RotaryArgs& args) {
  require_on_device(ctx, "rotary", {{"x", args.x}, {"positions", args.positions}});
  validate(args);
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      require(args.path == RotaryPath::automatic,
              "[rotary] the paths reference and simd are the CPU's, expected automatic on a GPU");
      require(args.x.dtype() != DType::f64, "[rotary] x has dtype f64, expected f32, bf16 or f16 on a GPU");
      ctx.set_backend("rotary", "cuda");
      if (args.x.numel() > 0 && args.dim > 0)
        rotary_kernels::turn_cuda(ctx, args.x, args.positions, frequencies(args.dim, args.base),
                                  args.interleaved, args.inverse);
      return;
    }
  }
  const bool simd = use_simd(ctx, args);
  const Tensor& x = args.x;
  const Problem problem{.x = x.raw(),
                        .dtype = x.dtype(),
                        .tokens = x.size(0),
                        .heads = x.size(1),
                        .token_stride = x.stride(0),
                        .head_stride = x.stride(1),
                        .channel_stride = x.stride(2),
                        .interleaved = args.interleaved,
                        .positions = read_positions(args.positions, args.inverse),
                        .frequencies = frequencies(args.dim, args.base)};
  ctx.set_backend("rotary", simd ? "simd" : "reference");
  if (x.numel() == 0 || args.dim == 0) return;
  if (!simd) {
    rotary_kernels::reference(problem);
    return;
  }
  constexpr std::int64_t kElementsForThread = 16384;
  const std::int64_t grain = std::max<std::int64_t>(1, kElementsForThread / (problem.heads * args.dim));
  const std::int64_t parts = std::clamp<std::int64_t>(problem.tokens / grain, 1, ctx.threads());
  const std::int64_t floats = rotary_kernels::workspace_floats(problem.pairs());
  const Tensor workspace = ctx.empty({parts, floats});
  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part)
      rotary_kernels::simd(problem, problem.tokens * part / parts, problem.tokens * (part + 1) / parts,
                           workspace.data<float>() + part * floats);
  });
}

}  // namespace krait
