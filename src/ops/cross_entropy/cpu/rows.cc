// cross_entropy with exponentials of f32 vectors; their sum and the logarithm are in f64.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/cross_entropy/cpu/rows.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd/convert-inl.h"
#include "core/simd/math-inl.h"
#include "ops/cross_entropy/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::cross_entropy_detail::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
// A row is walked in pieces of this many logits, widened to f32: a multiple of every vector.
constexpr int kPiece = 512;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Widens logits [begin, begin + kPiece) of a row; those beyond its end are minus infinity.
template <typename T>
void load_piece(const T* row, std::int64_t stride, std::int64_t begin, std::int64_t vocabulary,
                float* HWY_RESTRICT piece) {
  const std::int64_t n = std::min<std::int64_t>(kPiece, vocabulary - begin);
  std::int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes)
      hn::Store(krait::HWY_NAMESPACE::load_f32(D(), row + begin + i), D(), piece + i);
  }
  for (; i < n; ++i) piece[i] = static_cast<float>(row[(begin + i) * stride]);
  for (; i < kPiece; ++i) piece[i] = kLowest;
}

// The sum of exp(piece - largest), in f64.
double sum_of_exponentials(const float* HWY_RESTRICT piece, float largest) {
  const D d;
  const V shift = hn::Set(d, largest);
#if HWY_TARGET == HWY_SCALAR
  double sum = 0.0;
  for (int i = 0; i < kPiece; ++i)
    sum += static_cast<double>(
        hn::GetLane(krait::HWY_NAMESPACE::exp(d, hn::Sub(hn::Load(d, piece + i), shift))));
  return sum;
#else
  const hn::Half<D> half;
  const hn::Repartition<double, D> d64;
  auto low = hn::Zero(d64);
  auto high = hn::Zero(d64);
  for (int i = 0; i < kPiece; i += kLanes) {
    const V e = krait::HWY_NAMESPACE::exp(d, hn::Sub(hn::Load(d, piece + i), shift));
    low = hn::Add(low, hn::PromoteTo(d64, hn::LowerHalf(half, e)));
    high = hn::Add(high, hn::PromoteTo(d64, hn::UpperHalf(half, e)));
  }
  return hn::GetLane(hn::SumOfLanes(d64, hn::Add(low, high)));
#endif
}

template <typename T>
RowSums sums_of(const T* row, std::int64_t stride, std::int64_t vocabulary, bool with_logits) {
  HWY_ALIGN float piece[kPiece];
  RowSums sums;
  V largest_lanes = hn::Set(D(), kLowest);
  for (std::int64_t begin = 0; begin < vocabulary; begin += kPiece) {
    load_piece(row, stride, begin, vocabulary, piece);
    for (int i = 0; i < kPiece; i += kLanes) largest_lanes = hn::Max(largest_lanes, hn::Load(D(), piece + i));
    if (with_logits) {
      const std::int64_t n = std::min<std::int64_t>(kPiece, vocabulary - begin);
      for (std::int64_t i = 0; i < n; ++i) sums.logits += static_cast<double>(piece[i]);
    }
  }
  const float largest = hn::GetLane(hn::MaxOfLanes(D(), largest_lanes));
  if (std::isinf(largest)) {
    sums.logsumexp = static_cast<double>(largest);
    return sums;
  }
  double sum = 0.0;
  for (std::int64_t begin = 0; begin < vocabulary; begin += kPiece) {
    load_piece(row, stride, begin, vocabulary, piece);
    sum += sum_of_exponentials(piece, largest);
  }
  sums.logsumexp = static_cast<double>(largest) + std::log(sum);
  return sums;
}

template <typename T>
void part(const Rows& rows, std::int64_t begin, std::int64_t end) {
  const std::int64_t vocabulary = rows.logits.size(1);
  const std::int64_t stride = rows.logits.stride(1);
  for (std::int64_t t = begin; t < end; ++t) {
    const T* row = rows.logits.data<T>() + t * rows.logits.stride(0);
    const RowSums sums = sums_of(row, stride, vocabulary, rows.label_smoothing != 0.0);
    const std::int64_t target = rows.targets.data<std::int64_t>()[t];
    rows.logsumexp.data<float>()[t] = static_cast<float>(sums.logsumexp);
    rows.losses.data<float>()[t] =
        target == rows.ignore_index
            ? 0.0F
            : static_cast<float>(
                  loss_of(sums, static_cast<double>(row[target * stride]), rows.label_smoothing, vocabulary));
  }
}

void part_of(const Rows& rows, std::int64_t begin, std::int64_t end) {
  switch (rows.logits.dtype()) {
    case DType::bf16: return part<bf16>(rows, begin, end);
    case DType::f16: return part<f16>(rows, begin, end);
    default: return part<float>(rows, begin, end);
  }
}

template <typename T>
void store_piece(const float* HWY_RESTRICT piece, std::int64_t n, T* to, std::int64_t stride) {
  std::int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes)
      krait::HWY_NAMESPACE::store_f32(D(), hn::Load(D(), piece + i), to + i);
  for (; i < n; ++i) to[i * stride] = static_cast<T>(piece[i]);
}

template <typename TLogits, typename TGradient>
void gradient_part(const GradientRows& rows, std::int64_t begin, std::int64_t end) {
  const D d;
  const std::int64_t vocabulary = rows.logits.size(1);
  const auto scale = static_cast<float>(rows.scale);
  const V spread = hn::Set(d, static_cast<float>(rows.label_smoothing / static_cast<double>(vocabulary)));
  const auto hit = static_cast<float>(rows.scale * (1.0 - rows.label_smoothing));
  HWY_ALIGN float piece[kPiece];
  for (std::int64_t t = begin; t < end; ++t) {
    const TLogits* row = rows.logits.data<TLogits>() + t * rows.logits.stride(0);
    TGradient* to = rows.dlogits.data<TGradient>() + t * rows.dlogits.stride(0);
    const std::int64_t target = rows.targets.data<std::int64_t>()[t];
    const V shift = hn::Set(d, rows.logsumexp.data<float>()[t]);
    for (std::int64_t at = 0; at < vocabulary; at += kPiece) {
      const std::int64_t n = std::min<std::int64_t>(kPiece, vocabulary - at);
      if (target == rows.ignore_index) {
        for (int i = 0; i < kPiece; i += kLanes) hn::Store(hn::Zero(d), d, piece + i);
      } else {
        load_piece(row, rows.logits.stride(1), at, vocabulary, piece);
        for (int i = 0; i < kPiece; i += kLanes) {
          const V p = krait::HWY_NAMESPACE::exp(d, hn::Sub(hn::Load(d, piece + i), shift));
          hn::Store(hn::Mul(hn::Sub(p, spread), hn::Set(d, scale)), d, piece + i);
        }
        if (target >= at && target < at + n) piece[target - at] -= hit;
      }
      store_piece(piece, n, to + at * rows.dlogits.stride(1), rows.dlogits.stride(1));
    }
  }
}

template <typename TLogits>
void gradient_part_to(const GradientRows& rows, std::int64_t begin, std::int64_t end) {
  switch (rows.dlogits.dtype()) {
    case DType::bf16: return gradient_part<TLogits, bf16>(rows, begin, end);
    case DType::f16: return gradient_part<TLogits, f16>(rows, begin, end);
    default: return gradient_part<TLogits, float>(rows, begin, end);
  }
}

void gradient_part_of(const GradientRows& rows, std::int64_t begin, std::int64_t end) {
  switch (rows.logits.dtype()) {
    case DType::bf16: return gradient_part_to<bf16>(rows, begin, end);
    case DType::f16: return gradient_part_to<f16>(rows, begin, end);
    default: return gradient_part_to<float>(rows, begin, end);
  }
}

}  // namespace
}  // namespace krait::cross_entropy_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::cross_entropy_detail {

HWY_EXPORT(part_of);
HWY_EXPORT(gradient_part_of);

namespace {

std::int64_t rows_per_thread(const Tensor& logits) {
  constexpr std::int64_t kLogitsPerThread = 8192;
  return kLogitsPerThread / std::max<std::int64_t>(logits.size(1), 1) + 1;
}

}  // namespace

void simd_backward(Context& ctx, const GradientRows& rows) {
  const std::int64_t grain = rows_per_thread(rows.logits);
  parallel_for(ctx, rows.logits.size(0), grain, [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(gradient_part_of)(rows, begin, end);
  });
}

void simd(Context& ctx, const Rows& rows) {
  const std::int64_t grain = rows_per_thread(rows.logits);
  parallel_for(ctx, rows.logits.size(0), grain, [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(part_of)(rows, begin, end);
  });
}

}  // namespace krait::cross_entropy_detail
#endif
