// cross_entropy with every exponential, logarithm and sum in f64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "ops/cross_entropy/kernels.h"

namespace krait::cross_entropy_detail {
namespace {

template <typename T>
RowSums sums_of(const T* row, std::int64_t stride, std::int64_t vocabulary) {
  double largest = -std::numeric_limits<double>::infinity();
  double logits = 0.0;
  for (std::int64_t v = 0; v < vocabulary; ++v) {
    const auto logit = static_cast<double>(row[v * stride]);
    largest = std::max(largest, logit);
    logits += logit;
  }
  if (std::isinf(largest)) return {largest, logits};
  double sum = 0.0;
  for (std::int64_t v = 0; v < vocabulary; ++v)
    sum += std::exp(static_cast<double>(row[v * stride]) - largest);
  return {largest + std::log(sum), logits};
}

template <typename TLogits, typename TLoss>
void part(const Rows& rows, std::int64_t begin, std::int64_t end) {
  const std::int64_t vocabulary = rows.logits.size(1);
  const std::int64_t stride = rows.logits.stride(1);
  for (std::int64_t t = begin; t < end; ++t) {
    const TLogits* row = rows.logits.data<TLogits>() + t * rows.logits.stride(0);
    const RowSums sums = sums_of(row, stride, vocabulary);
    const std::int64_t target = rows.targets.data<std::int64_t>()[t];
    rows.logsumexp.data<TLoss>()[t] = static_cast<TLoss>(sums.logsumexp);
    rows.losses.data<TLoss>()[t] =
        target == rows.ignore_index
            ? TLoss{0}
            : static_cast<TLoss>(
                  loss_of(sums, static_cast<double>(row[target * stride]), rows.label_smoothing, vocabulary));
  }
}

template <typename TLogits, typename TGradient>
void gradient_part(const GradientRows& rows, std::int64_t begin, std::int64_t end) {
  const std::int64_t vocabulary = rows.logits.size(1);
  const double spread = rows.label_smoothing / static_cast<double>(vocabulary);
  for (std::int64_t t = begin; t < end; ++t) {
    const TLogits* row = rows.logits.data<TLogits>() + t * rows.logits.stride(0);
    TGradient* to = rows.dlogits.data<TGradient>() + t * rows.dlogits.stride(0);
    const std::int64_t target = rows.targets.data<std::int64_t>()[t];
    const double logsumexp = rows.logsumexp.dtype() == DType::f64
                                 ? rows.logsumexp.data<double>()[t]
                                 : static_cast<double>(rows.logsumexp.data<float>()[t]);
    for (std::int64_t v = 0; v < vocabulary; ++v) {
      double gradient = 0.0;
      if (target != rows.ignore_index) {
        gradient = std::exp(static_cast<double>(row[v * rows.logits.stride(1)]) - logsumexp) - spread;
        if (v == target) gradient -= 1.0 - rows.label_smoothing;
      }
      using Wide = std::conditional_t<std::is_same_v<TGradient, double>, double, float>;
      to[v * rows.dlogits.stride(1)] = static_cast<TGradient>(static_cast<Wide>(rows.scale * gradient));
    }
  }
}

}  // namespace

void reference_backward(Context& ctx, const GradientRows& rows) {
  parallel_for(ctx, rows.logits.size(0), 1, [&](std::int64_t begin, std::int64_t end) {
    dispatch_float(rows.logits.dtype(), "[cross_entropy_backward] logits", [&](auto logits) {
      dispatch_float(rows.dlogits.dtype(), "[cross_entropy_backward] dlogits", [&](auto gradient) {
        gradient_part<typename decltype(logits)::type, typename decltype(gradient)::type>(rows, begin, end);
      });
    });
  });
}

void reference(Context& ctx, const Rows& rows) {
  parallel_for(ctx, rows.logits.size(0), 1, [&](std::int64_t begin, std::int64_t end) {
    dispatch_float(rows.logits.dtype(), "[cross_entropy] logits", [&](auto tag) {
      using T = typename decltype(tag)::type;
      if (rows.losses.dtype() == DType::f64) {
        part<T, double>(rows, begin, end);
      } else {
        part<T, float>(rows, begin, end);
      }
    });
  });
}

}  // namespace krait::cross_entropy_detail
