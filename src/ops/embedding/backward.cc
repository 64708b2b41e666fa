#include <algorithm>
#include <vector>

#include "core/build.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "krait/core/error.h"
#include "krait/ops/embedding.h"
#include "ops/embedding/kernels.h"

namespace krait {
namespace {

constexpr const char* kOp = "embedding_backward";

// Rows of one id are added in the order of their positions, whatever thread adds them.
template <typename TOut, typename TSum>
void add_rows(const Tensor& dout, const std::vector<std::int64_t>& ids, const Tensor& dweight,
              std::int64_t begin, std::int64_t end) {
  const std::int64_t from_step = dout.stride(1);
  const std::int64_t to_step = dweight.stride(1);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const TOut* from = dout.data<TOut>() + static_cast<std::int64_t>(i) * dout.stride(0);
    TSum* to = dweight.data<TSum>() + ids[i] * dweight.stride(0);
    if (from_step == 1 && to_step == 1) {
      for (std::int64_t c = begin; c < end; ++c) to[c] += static_cast<TSum>(from[c]);
    } else {
      for (std::int64_t c = begin; c < end; ++c) to[c * to_step] += static_cast<TSum>(from[c * from_step]);
    }
  }
}

}  // namespace

void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args) {
  require(args.ids.defined() && args.dout.defined() && args.dweight.defined(), "[", kOp,
          "] ids, dout or dweight is absent");
  require_on_device(ctx, kOp, {{"ids", args.ids}, {"dout", args.dout}, {"dweight", args.dweight}});
  require(args.ids.dtype() == DType::i64 || args.ids.dtype() == DType::i32, "[", kOp, "] ids has dtype ",
          args.ids.dtype(), ", expected i64 or i32");
  require(args.dweight.ndim() == 2, "[", kOp, "] dweight has shape ", args.dweight.shape(),
          ", expected (vocabulary, d)");
  require(args.dweight.dtype() == DType::f32 || args.dweight.dtype() == DType::f64, "[", kOp,
          "] dweight has dtype ", args.dweight.dtype(),
          ", expected f32 or f64: gradients are added up in it");
  require(is_float(args.dout.dtype()), "[", kOp, "] dout has dtype ", args.dout.dtype(),
          ", expected f32, f64, bf16 or f16");
  Dims shape = args.ids.shape();
  shape.push_back(args.dweight.size(1));
  require(args.dout.shape() == shape, "[", kOp, "] dout has shape ", args.dout.shape(), ", expected ", shape);
  const std::int64_t count = args.ids.numel();
  const Dims flat{count, args.dweight.size(1)};
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      require(args.dout.dtype() != DType::f64 && args.dweight.dtype() != DType::f64, "[", kOp,
              "] dout and dweight have dtypes ", args.dout.dtype(), " and ", args.dweight.dtype(),
              ", expected no f64 on a GPU");
      ctx.set_backend(kOp, "cuda");
      if (args.dout.numel() == 0) return;
      const Tensor rows = args.dout.ndim() == 2 ? args.dout : ctx.contiguous(args.dout).view(flat);
      return embedding_detail::backward_cuda(ctx, ctx.contiguous(args.ids).view({count}), rows, args.dweight);
    }
  }
  const Tensor wide = args.ids.to(DType::i64).contiguous();
  const auto values = wide.span<std::int64_t>();
  const std::vector<std::int64_t> ids(values.begin(), values.end());
  for (std::size_t i = 0; i < ids.size(); ++i)
    require(ids[i] >= 0 && ids[i] < args.dweight.size(0), "[", kOp, "] id ", ids[i], " at position ", i,
            " is outside [0, ", args.dweight.size(0), ")");
  if (args.dout.numel() == 0) return;

  const Tensor rows = args.dout.ndim() == 2 ? args.dout : args.dout.contiguous().view(flat);
  constexpr std::int64_t kElementsPerThread = 32768;
  const auto grain = kElementsPerThread / count + 16;
  dispatch_float(rows.dtype(), "[embedding_backward] dout", [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(ctx, rows.size(1), grain, [&](std::int64_t begin, std::int64_t end) {
      if (args.dweight.dtype() == DType::f64)
        add_rows<T, double>(rows, ids, args.dweight, begin, end);
      else
        add_rows<T, float>(rows, ids, args.dweight, begin, end);
    });
  });
  ctx.set_backend(kOp, "columns");
}

}  // namespace krait
