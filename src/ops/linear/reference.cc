// linear by plain loops with sums in f64, in the order of the shared dimension.
#include <cstddef>
#include <vector>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "ops/linear/kernels.h"

namespace krait::linear_detail {
namespace {

template <typename TWeight, typename TOut>
void product(Context& ctx, const Problem& p, const std::vector<double>& x, const std::vector<double>& bias) {
  const std::int64_t rows = p.x.size(0);
  const std::int64_t in = p.weight.size(1);
  const TWeight* weight = p.weight.data<TWeight>();
  TOut* out = p.out.data<TOut>();
  parallel_for(ctx, p.weight.size(0), 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t o = begin; o < end; ++o) {
      for (std::int64_t r = 0; r < rows; ++r) {
        double sum = bias.empty() ? 0.0 : bias[static_cast<std::size_t>(o)];
        for (std::int64_t i = 0; i < in; ++i) {
          const auto w = static_cast<double>(weight[o * p.weight.stride(0) + i * p.weight.stride(1)]);
          sum += w * x[static_cast<std::size_t>(r * in + i)];
        }
        TOut& to = out[r * p.out.stride(0) + o * p.out.stride(1)];
        if (p.accumulate) sum += static_cast<double>(to);
        if constexpr (size_of(dtype_of<TOut>) == 2) {
          to = TOut(static_cast<float>(sum));
        } else {
          to = static_cast<TOut>(sum);
        }
      }
    }
  });
}

std::vector<double> as_doubles(const Tensor& t) {
  if (!t) return {};
  const Tensor wide = t.to(DType::f64).contiguous();
  const auto values = wide.span<double>();
  return {values.begin(), values.end()};
}

}  // namespace

void reference(Context& ctx, const Problem& p) {
  const std::vector<double> x = as_doubles(p.x);
  const std::vector<double> bias = as_doubles(p.bias);
  dispatch_float(p.weight.dtype(), "[linear] weight", [&](auto weight) {
    dispatch_float(p.out.dtype(), "[linear] out", [&](auto out) {
      product<typename decltype(weight)::type, typename decltype(out)::type>(ctx, p, x, bias);
    });
  });
}

void column_sums_reference(const Tensor& dout, const Tensor& bias) {
  const std::vector<double> rows = as_doubles(dout);
  std::vector<double> sums = as_doubles(bias);
  const std::size_t columns = sums.size();
  for (std::size_t i = 0; i < rows.size(); ++i) sums[i % columns] += rows[i];
  bias.copy_from(Tensor::from(sums));
}

}  // namespace krait::linear_detail
