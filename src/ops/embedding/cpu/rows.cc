// embedding: rows are widened or rounded a vector at a time.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/embedding/cpu/rows.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd/convert-inl.h"
#include "ops/embedding/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::embedding_detail::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using krait::HWY_NAMESPACE::load_f32;
using krait::HWY_NAMESPACE::load_f32_n;
using krait::HWY_NAMESPACE::store_f32;
using krait::HWY_NAMESPACE::store_f32_n;

template <typename TFrom, typename TTo>
void copy_row(const TFrom* HWY_RESTRICT from, TTo* HWY_RESTRICT to, std::int64_t n) {
  if constexpr (std::is_same_v<TFrom, TTo>) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(TTo));
  } else {
    const hn::ScalableTag<float> d;
    const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) store_f32(d, load_f32(d, from + i), to + i);
    const auto left = static_cast<std::size_t>(n - i);
    if (left > 0) store_f32_n(d, load_f32_n(d, from + i, left), to + i, left);
  }
}

template <typename TFrom, typename TTo>
void copy_part(const Tensor& weight, std::span<const std::int64_t> ids, const Tensor& out, std::int64_t begin,
               std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i)
    copy_row(weight.data<TFrom>() + ids[static_cast<std::size_t>(i)] * weight.stride(0),
             out.data<TTo>() + i * out.stride(0), out.size(1));
}

void copy_part_of(const Tensor& weight, std::span<const std::int64_t> ids, const Tensor& out,
                  std::int64_t begin, std::int64_t end) {
  dispatch_float(weight.dtype(), "[embedding] weight", [&](auto from) {
    dispatch_float(out.dtype(), "[embedding] out", [&](auto to) {
      using TFrom = typename decltype(from)::type;
      using TTo = typename decltype(to)::type;
      if constexpr (!std::is_same_v<TFrom, double> && !std::is_same_v<TTo, double>)
        copy_part<TFrom, TTo>(weight, ids, out, begin, end);
    });
  });
}

}  // namespace
}  // namespace krait::embedding_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::embedding_detail {

HWY_EXPORT(copy_part_of);

void copy_rows(Context& ctx, const Tensor& weight, std::span<const std::int64_t> ids, const Tensor& out) {
  constexpr std::int64_t kElementsPerThread = 32768;
  const std::int64_t grain = kElementsPerThread / std::max<std::int64_t>(out.size(1), 1) + 1;
  parallel_for(ctx, out.size(0), grain, [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(copy_part_of)(weight, ids, out, begin, end);
  });
}

}  // namespace krait::embedding_detail
#endif
