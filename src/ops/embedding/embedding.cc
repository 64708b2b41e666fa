#include "krait/ops/embedding.h"

#include <vector>

#include "core/build.h"
#include "krait/core/error.h"
#include "ops/embedding/kernels.h"

namespace krait {
namespace {

Dims shape_of_out(const EmbeddingArgs& args) {
  require(args.ids.ndim() < Dims::max_ndim, "[embedding] ids has shape ", args.ids.shape(),
          ", expected at most ", Dims::max_ndim - 1, " sizes");
  Dims shape = args.ids.shape();
  shape.push_back(args.weight.size(1));
  return shape;
}

void validate(const EmbeddingArgs& args) {
  require(args.ids.defined(), "[embedding] ids is absent");
  require(args.weight.defined(), "[embedding] weight is absent");
  require(args.ids.dtype() == DType::i64 || args.ids.dtype() == DType::i32, "[embedding] ids has dtype ",
          args.ids.dtype(), ", expected i64 or i32");
  require(is_float(args.weight.dtype()), "[embedding] weight has dtype ", args.weight.dtype(),
          ", expected f32, f64, bf16 or f16");
  require(args.weight.ndim() == 2, "[embedding] weight has shape ", args.weight.shape(),
          ", expected (vocabulary, d)");
  const DType dtype = args.out ? args.out.dtype() : args.out_dtype;
  require(is_float(dtype), "[embedding] out has dtype ", dtype, ", expected f32, f64, bf16 or f16");
  if (args.out)
    require(args.out.shape() == shape_of_out(args), "[embedding] out has shape ", args.out.shape(),
            ", expected ", shape_of_out(args));
}

std::vector<std::int64_t> checked_ids(const Tensor& ids, std::int64_t vocabulary) {
  const Tensor wide = ids.to(DType::i64).contiguous();
  const auto values = wide.span<std::int64_t>();
  for (std::size_t i = 0; i < values.size(); ++i)
    require(values[i] >= 0 && values[i] < vocabulary, "[embedding] id ", values[i], " at position ", i,
            " is outside [0, ", vocabulary, ")");
  return {values.begin(), values.end()};
}

Tensor on_gpu(Context& ctx, const EmbeddingArgs& args) {
  const Dims shape = shape_of_out(args);
  const Tensor out = args.out ? args.out : ctx.empty(shape, args.out_dtype);
  for (const DType dtype : {args.weight.dtype(), out.dtype()})
    require(dtype != DType::f64, "[embedding] weight and out have dtypes ", args.weight.dtype(), " and ",
            out.dtype(), ", expected f32, bf16 or f16 on a GPU");
  ctx.set_backend("embedding", "cuda");
  if (out.numel() == 0) return out;
  const bool direct = out.is_contiguous();
  const Tensor target = direct ? out : ctx.empty(shape, out.dtype());
  const Tensor ids = ctx.contiguous(args.ids).view({args.ids.numel()});
  embedding_detail::gather_cuda(ctx, args.weight, ids, target.view({ids.size(0), shape.back()}));
  if (!direct) ctx.copy(target, out);
  return out;
}

}  // namespace

Tensor embedding(Context& ctx, const EmbeddingArgs& args) {
  require_on_device(ctx, "embedding", {{"ids", args.ids}, {"weight", args.weight}, {"out", args.out}});
  validate(args);
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) return on_gpu(ctx, args);
  }
  const std::vector<std::int64_t> ids = checked_ids(args.ids, args.weight.size(0));
  const Dims shape = shape_of_out(args);
  const Tensor out = args.out ? args.out : ctx.empty(shape, args.out_dtype);
  if (out.numel() == 0) return out;

  // A destination with gaps between its rows' elements or groups of rows is filled from a copy.
  const bool direct = out.is_contiguous();
  const Tensor target = direct ? out : ctx.empty(shape, out.dtype());
  const Tensor rows = target.view({static_cast<std::int64_t>(ids.size()), shape.back()});
  const bool f64 = args.weight.dtype() == DType::f64 || out.dtype() == DType::f64;
  if (ctx.reference() || f64 || args.weight.stride(1) != 1) {
    embedding_detail::reference(args.weight, ids, rows);
    ctx.set_backend("embedding", "reference");
  } else {
    embedding_detail::copy_rows(ctx, args.weight, ids, rows);
    ctx.set_backend("embedding", concat("simd (", simd_target(), ")"));
  }
  if (!direct) out.copy_from(target);
  return out;
}

}  // namespace krait
