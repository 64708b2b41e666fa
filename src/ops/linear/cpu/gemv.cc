// linear for few rows of x: each weight is read from memory and widened once, and used for all rows.
// The time is that of reading the weights.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/linear/cpu/gemv.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd/convert-inl.h"
#include "ops/linear/cpu/finish-inl.h"
#include "ops/linear/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::linear_detail::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using krait::HWY_NAMESPACE::finish_row;
using krait::HWY_NAMESPACE::load_f32;

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
// Weights are taken in steps of two vectors, of 16-bit elements in one load.
constexpr int kStep = 2 * kLanes;
// Outputs whose sums are collected before they are finished: a multiple of every block height.
constexpr int kRun = 24;
// Rows of x that meet a block while its weights are in the first-level cache; beyond them the weights are
// read from memory again.
constexpr int kMaxColumns = 32;
constexpr std::int64_t kProductsPerThread = 25000;
// The largest block of weights that is asked for ahead of its use.
constexpr std::int64_t kPrefetchBytes = 131072;

// Weight rows that a block multiplies with `columns` rows of x at once: one register for each product
// sum, and room for the operands.
constexpr int block_rows(int columns) {
#if (HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86) || HWY_ARCH_ARM_A64
  return columns == 1 ? 4 : columns == 2 ? 8 : 6;
#else
  return columns <= 2 ? 4 : 2;
#endif
}

// Half (0 or 1) of the kStep weights at `w`, widened. Of bf16, half 0 holds the even elements and half 1
// the odd ones: a shift and a mask of one register, where widening in order would shuffle across it.
template <int kHalf, typename T>
HWY_INLINE V load_half(const T* HWY_RESTRICT w) {
  return load_f32(D(), w + kHalf * kLanes);
}

#if HWY_TARGET != HWY_SCALAR
template <int kHalf>
HWY_INLINE V load_half(const bf16* HWY_RESTRICT w) {
  const D d;
  const hn::RebindToUnsigned<D> d32;
  const hn::Repartition<std::uint16_t, D> d16;
  const auto bits = hn::BitCast(d32, hn::LoadU(d16, &w->bits));
  if constexpr (kHalf == 0) return hn::BitCast(d, hn::ShiftLeft<16>(bits));
  return hn::BitCast(d, hn::And(bits, hn::Set(d32, 0xffff0000U)));
}
#endif

// Loads a vector that several products share. GCC for x86 would load it again for each product, as their
// memory operand, and run out of loads before it runs out of multipliers.
HWY_INLINE V load_once(const float* HWY_RESTRICT p) {
  V v = hn::LoadU(D(), p);
#if HWY_ARCH_X86 && HWY_COMPILER_GCC_ACTUAL
  asm("" : "+v"(v.raw));
#endif
  return v;
}

// Copies a row of x as f32 in the order of load_half, padded with zeros to whole steps.
template <typename TWeight, typename TX>
void pack_row(const TX* HWY_RESTRICT x, std::int64_t stride, std::int64_t in, float* HWY_RESTRICT packed) {
  const D d;
  const bool split = std::is_same_v<TWeight, bf16>;
  std::int64_t i = 0;
  if (stride == 1) {
    for (; i + kStep <= in; i += kStep) {
      const V low = load_f32(d, x + i);
      const V high = load_f32(d, x + i + kLanes);
#if HWY_TARGET != HWY_SCALAR
      if constexpr (split) {
        hn::StoreU(hn::ConcatEven(d, high, low), d, packed + i);
        hn::StoreU(hn::ConcatOdd(d, high, low), d, packed + i + kLanes);
        continue;
      }
#endif
      hn::StoreU(low, d, packed + i);
      hn::StoreU(high, d, packed + i + kLanes);
    }
  }
  for (; i < in; i += kStep) {
    for (int j = 0; j < kStep; ++j) {
      const int place = !split ? j : j / 2 + (j % 2) * kLanes;
      packed[i + place] = i + j < in ? static_cast<float>(x[(i + j) * stride]) : 0.0F;
    }
  }
}

// sums[c * kRun + r] = weight row r . row c of x, for r < rows <= kRows and c < kColumns. Every product
// sum runs over one register in the order of i, whatever kRows and kColumns are.
template <int kRows, int kColumns, typename T>
HWY_NOINLINE void multiply_block(const T* HWY_RESTRICT weight, std::int64_t stride, std::int64_t rows,
                                 std::int64_t in, const float* HWY_RESTRICT x, std::int64_t x_stride,
                                 float* HWY_RESTRICT sums) {
  const D d;
  const T* w[kRows];
  for (int r = 0; r < kRows; ++r) w[r] = weight + std::min<std::int64_t>(r, rows - 1) * stride;
  V sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) sum[r][c] = hn::Zero(d);

  // The next block's weights are asked for in the order in which they lie in memory, because hardware
  // prefetchers lose short rows at their ends. Nothing is asked for where rows have gaps or a block
  // would not stay in the second-level cache.
  const bool prefetch = stride == in && kRows * in * static_cast<std::int64_t>(sizeof(T)) <= kPrefetchBytes;
  const char* next = reinterpret_cast<const char*>(weight);
  if (prefetch) next += kRows * in * static_cast<std::int64_t>(sizeof(T));
  constexpr int kStepBytes = kRows * kStep * static_cast<int>(sizeof(T));
  const std::int64_t advance = prefetch ? kStepBytes : 0;

  const std::int64_t whole = in / kStep * kStep;
  for (std::int64_t i = 0; i < whole; i += kStep, next += advance) {
    for (int line = 0; line < kStepBytes; line += 64) hwy::Prefetch(next + line);
    V half[kRows];
    for (int r = 0; r < kRows; ++r) half[r] = load_half<0>(w[r] + i);
    for (int c = 0; c < kColumns; ++c) {
      const V value = load_once(x + c * x_stride + i);
      for (int r = 0; r < kRows; ++r) sum[r][c] = hn::MulAdd(half[r], value, sum[r][c]);
    }
    for (int r = 0; r < kRows; ++r) half[r] = load_half<1>(w[r] + i);
    for (int c = 0; c < kColumns; ++c) {
      const V value = load_once(x + c * x_stride + i + kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][c] = hn::MulAdd(half[r], value, sum[r][c]);
    }
  }

  if (whole < in) {  // copied, because the last row may end where the mapping of its file ends
    for (int r = 0; r < kRows; ++r) {
      T tail[kStep] = {};
      std::memcpy(tail, w[r] + whole, static_cast<std::size_t>(in - whole) * sizeof(T));
      for (int c = 0; c < kColumns; ++c) {
        const float* value = x + c * x_stride + whole;
        sum[r][c] = hn::MulAdd(load_half<0>(tail), hn::LoadU(d, value), sum[r][c]);
        sum[r][c] = hn::MulAdd(load_half<1>(tail), hn::LoadU(d, value + kLanes), sum[r][c]);
      }
    }
  }
  for (std::int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < kColumns; ++c) sums[c * kRun + r] = hn::GetLane(hn::SumOfLanes(d, sum[r][c]));
}

// The products of `rows` weight rows with `columns` <= kMaxColumns rows of x. The weights of a block
// stay in the first-level cache while it meets all rows of x.
template <typename T>
void multiply_run(const T* weight, std::int64_t stride, std::int64_t rows, std::int64_t in, const float* x,
                  std::int64_t x_stride, std::int64_t columns, float* sums) {
  const int height = block_rows(columns <= 2 ? static_cast<int>(columns) : 4);
  for (std::int64_t r = 0; r < rows; r += height) {
    const T* w = weight + r * stride;
    const std::int64_t valid = std::min<std::int64_t>(height, rows - r);
    if (columns == 1) {
      multiply_block<block_rows(1), 1>(w, stride, valid, in, x, x_stride, sums + r);
      continue;
    }
    if (columns == 2) {
      multiply_block<block_rows(2), 2>(w, stride, valid, in, x, x_stride, sums + r);
      continue;
    }
    // Rows of x beyond `columns` are zeros up to a multiple of 4.
    for (std::int64_t c = 0; c < columns; c += 4)
      multiply_block<block_rows(4), 4>(w, stride, valid, in, x + c * x_stride, x_stride, sums + c * kRun + r);
  }
}

template <typename T>
void multiply_part(const Problem& p, const float* x, std::int64_t x_stride, const float* bias,
                   std::int64_t begin, std::int64_t end) {
  const std::int64_t stride = p.weight.stride(0);
  const T* weight = p.weight.data<T>();
  HWY_ALIGN float sums[kMaxColumns * kRun];
  for (std::int64_t c0 = 0; c0 < p.x.size(0); c0 += kMaxColumns) {
    const std::int64_t columns = std::min<std::int64_t>(kMaxColumns, p.x.size(0) - c0);
    for (std::int64_t o = begin; o < end; o += kRun) {
      const std::int64_t count = std::min<std::int64_t>(kRun, end - o);
      multiply_run(weight + o * stride, stride, count, p.weight.size(1), x + c0 * x_stride, x_stride, columns,
                   sums);
      dispatch_float(p.out.dtype(), "[linear] out", [&](auto tag) {
        using TOut = typename decltype(tag)::type;
        if constexpr (!std::is_same_v<TOut, double>) {
          TOut* out = p.out.data<TOut>() + c0 * p.out.stride(0) + o * p.out.stride(1);
          for (std::int64_t c = 0; c < columns; ++c)
            finish_row(sums + c * kRun, count, bias == nullptr ? nullptr : bias + o,
                       out + c * p.out.stride(0), p.out.stride(1), p.accumulate);
        }
      });
    }
  }
}

template <typename T>
void run(Context& ctx, const Problem& p, const float* bias, float* x, std::int64_t x_stride) {
  const std::int64_t rows = p.x.size(0);
  const std::int64_t in = p.x.size(1);
  dispatch_float(p.x.dtype(), "[linear] x", [&](auto tag) {
    using TX = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<TX, double>) {
      for (std::int64_t r = 0; r < rows; ++r)
        pack_row<T>(p.x.data<TX>() + r * p.x.stride(0), p.x.stride(1), in, x + r * x_stride);
    }
  });
  // Threads take whole blocks, and each at least kWeightsPerThread products: less is not worth a fork.
  const int height = block_rows(rows <= 2 ? static_cast<int>(rows) : 4);
  const std::int64_t blocks = (p.weight.size(0) + height - 1) / height;
  const std::int64_t products = std::max<std::int64_t>(height * in * rows, 1);
  parallel_for(
      ctx, blocks, (kProductsPerThread + products - 1) / products, [&](std::int64_t begin, std::int64_t end) {
        multiply_part<T>(p, x, x_stride, bias, begin * height, std::min(end * height, p.weight.size(0)));
      });
}

void gemv_simd(Context& ctx, const Problem& p, const float* bias, float* x, std::int64_t x_stride) {
  switch (p.weight.dtype()) {
    case DType::bf16: return run<bf16>(ctx, p, bias, x, x_stride);
    case DType::f16: return run<f16>(ctx, p, bias, x, x_stride);
    default: return run<float>(ctx, p, bias, x, x_stride);
  }
}

}  // namespace
}  // namespace krait::linear_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::linear_detail {

HWY_EXPORT(gemv_simd);

void gemv(Context& ctx, const Problem& problem) {
  // Rows of x go by fours, padded to whole steps of the widest target.
  const std::int64_t rows = problem.x.size(0);
  const std::int64_t x_stride = (problem.x.size(1) + 31) / 32 * 32;
  const Tensor x = ctx.empty({(rows + 3) / 4 * 4, x_stride});
  if (rows > 2) x.slice(0, rows, x.size(0)).fill(0.0);
  const Tensor bias = bias_as_f32(ctx, problem.bias);
  HWY_DYNAMIC_DISPATCH(gemv_simd)
  (ctx, problem, bias ? bias.data<float>() : nullptr, x.data<float>(), x_stride);
}

}  // namespace krait::linear_detail
#endif
