#include "krait/ops/dropout.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/build.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/dropout/bits.h"
#include "ops/gpu_dtypes.h"

namespace krait {
namespace {

using dropout_detail::kElementsPerBlock;
using dropout_detail::kMaxOverrun;
using dropout_detail::Rule;

constexpr std::int64_t kStretch = 4096;  // elements whose bits are in the first-level cache at a time

template <typename T>
void drop(const Rule& rule, const T* x, T* out, std::int64_t begin, std::int64_t end) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  alignas(64) std::uint16_t bits[kStretch + 2 * kElementsPerBlock + kMaxOverrun];
  const Sum scale = static_cast<Sum>(rule.scale);
  for (std::int64_t at = begin; at < end; at += kStretch) {
    const std::int64_t count = std::min(kStretch, end - at);
    const std::uint64_t place = rule.offset + static_cast<std::uint64_t>(at);
    const auto skip = static_cast<std::int64_t>(place % kElementsPerBlock);
    dropout_detail::random_bits(rule.seed, rule.stream, place / kElementsPerBlock,
                                (skip + count + kElementsPerBlock - 1) / kElementsPerBlock, bits);
    const std::uint16_t* own = bits + skip;
    for (std::int64_t i = 0; i < count; ++i) {
      const Sum factor = own[i] >= rule.dropped ? scale : Sum{0};
      // A product with 0 would keep NaN and infinity alive, and a sign.
      const Sum kept = static_cast<Sum>(x[at + i]) * factor;
      out[at + i] = static_cast<T>(factor == Sum{0} ? Sum{0} : kept);
    }
  }
}

}  // namespace

Tensor dropout(Context& ctx, const DropoutArgs& args) {
  require(args.x.defined(), "[dropout] x is absent");
  require(is_float(args.x.dtype()), "[dropout] x has dtype ", args.x.dtype(),
          ", expected f32, f64, bf16 or f16");
  require(args.probability >= 0.0 && args.probability < 1.0, "[dropout] probability is ", args.probability,
          ", expected at least 0 and less than 1");
  if (args.out)
    require(args.out.shape() == args.x.shape() && args.out.dtype() == args.x.dtype(), "[dropout] out is ",
            args.out.dtype(), " ", args.out.shape(), ", expected ", args.x.dtype(), " ", args.x.shape());
  require_on_device(ctx, "dropout", {{"x", args.x}, {"out", args.out}});
  if (ctx.on_gpu()) require_gpu_floats("dropout", {{"x", args.x}});
  const Tensor out = args.out ? args.out : ctx.empty(args.x.shape(), args.x.dtype());

  const double dropped = std::min(std::round(args.probability * 65536.0), 65535.0);
  const Rule rule{.seed = args.seed,
                  .stream = args.stream,
                  .offset = args.offset,
                  .dropped = static_cast<std::uint32_t>(dropped),
                  .scale = 1.0 / (1.0 - dropped / 65536.0)};
  const Tensor from = ctx.contiguous(args.x);
  const Tensor to = out.is_contiguous() ? out : ctx.empty(out.shape(), out.dtype());
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      dropout_detail::cuda(ctx, rule, from, to);
      if (!out.is_contiguous()) ctx.copy(to, out);
      ctx.set_backend("dropout", "cuda");
      return out;
    }
  }
  dispatch_float(from.dtype(), "[dropout] x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = from.data<T>();
    T* y = to.data<T>();
    parallel_for(ctx, from.numel(), kStretch,
                 [&](std::int64_t begin, std::int64_t end) { drop(rule, x, y, begin, end); });
  });
  if (!out.is_contiguous()) out.copy_from(to);
  ctx.set_backend("dropout", concat("philox (", simd_target(), ")"));
  return out;
}

}  // namespace krait
