// Softmax while the keys go by (Milakov and Gimelshein 2018; Dao et al. 2022, "FlashAttention"): for each row
// the largest score so far, the sum of weights relative to it, and the sum of weighted values. Scores are
// held in units of log2, so that weights are powers of two.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/attention/cpu/attention_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>

#include "core/simd/convert-inl.h"
#include "core/simd/gemm-inl.h"
#include "core/simd/gemm.h"
#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "ops/attention/cpu/rows-inl.h"
#include "ops/attention/kernels.h"

#ifndef KRAIT_OPS_ATTENTION_CPU_ATTENTION_SIMD_ONCE
#define KRAIT_OPS_ATTENTION_CPU_ATTENTION_SIMD_ONCE
namespace krait::attention_kernels {

// Up to here rows are too few to pay for packing keys into panels.
inline constexpr std::int64_t kFewRows = 8;

// What a row carries from one block of keys to the next. Also the layout of partial results.
struct Running {
  float* largest;  // (rows) the largest score
  float* total;    // (rows) the sum of 2^(score - largest)
  float* value;    // (rows, head_dim_v) the sum of 2^(score - largest) v

  Running(float* at, std::int64_t rows)
      : largest(at), total(at + aligned(rows)), value(at + 2 * aligned(rows)) {}
  static std::int64_t floats(std::int64_t rows, std::int64_t head_dim_v) {
    return 2 * aligned(rows) + aligned(rows * head_dim_v);
  }
};

}  // namespace krait::attention_kernels
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::attention_kernels::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = krait::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// A block of rows against keys [first_key, first_key + keys) of one head.
template <typename T>
struct Block {
  std::int64_t rows;
  std::int64_t keys;
  Strided<const T> k;  // (keys, head_dim)
  Strided<const T> v;  // (keys, head_dim_v)
};

// scores[r] = q[r] . k[j] for four keys at a time.
template <typename T>
void score_few(const Block<T>& block, const float* q, std::int64_t head_dim, float* scores) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const std::int64_t whole = head_dim / lanes * lanes;
  const auto rest = static_cast<std::size_t>(head_dim - whole);
  std::int64_t j = 0;
  for (; j + 4 <= block.keys; j += 4) {
    const T* k0 = block.k.data + j * block.k.row_stride;
    const T* k1 = k0 + block.k.row_stride;
    const T* k2 = k1 + block.k.row_stride;
    const T* k3 = k2 + block.k.row_stride;
    for (std::int64_t r = 0; r < block.rows; ++r) {
      const float* row = q + r * head_dim;
      V s0 = hn::Zero(d);
      V s1 = s0;
      V s2 = s0;
      V s3 = s0;
      for (std::int64_t c = 0; c < whole; c += lanes) {
        const V x = hn::LoadU(d, row + c);
        s0 = hn::MulAdd(x, simd::load_f32(d, k0 + c), s0);
        s1 = hn::MulAdd(x, simd::load_f32(d, k1 + c), s1);
        s2 = hn::MulAdd(x, simd::load_f32(d, k2 + c), s2);
        s3 = hn::MulAdd(x, simd::load_f32(d, k3 + c), s3);
      }
      if (rest > 0) {
        const V x = simd::load_f32_n(d, row + whole, rest);
        s0 = hn::MulAdd(x, simd::load_f32_n(d, k0 + whole, rest), s0);
        s1 = hn::MulAdd(x, simd::load_f32_n(d, k1 + whole, rest), s1);
        s2 = hn::MulAdd(x, simd::load_f32_n(d, k2 + whole, rest), s2);
        s3 = hn::MulAdd(x, simd::load_f32_n(d, k3 + whole, rest), s3);
      }
      float* to = scores + r * kBlockKeys + j;
      to[0] = hn::GetLane(hn::SumOfLanes(d, s0));
      to[1] = hn::GetLane(hn::SumOfLanes(d, s1));
      to[2] = hn::GetLane(hn::SumOfLanes(d, s2));
      to[3] = hn::GetLane(hn::SumOfLanes(d, s3));
    }
  }
  for (; j < block.keys; ++j) {
    const T* k0 = block.k.data + j * block.k.row_stride;
    for (std::int64_t r = 0; r < block.rows; ++r) {
      const float* row = q + r * head_dim;
      V sum = hn::Zero(d);
      for (std::int64_t c = 0; c < whole; c += lanes)
        sum = hn::MulAdd(hn::LoadU(d, row + c), simd::load_f32(d, k0 + c), sum);
      if (rest > 0)
        sum = hn::MulAdd(simd::load_f32_n(d, row + whole, rest), simd::load_f32_n(d, k0 + whole, rest), sum);
      scores[r * kBlockKeys + j] = hn::GetLane(hn::SumOfLanes(d, sum));
    }
  }
}

// value += weights v for `count` vectors of one row, which stay in registers while the keys go by.
template <int kCount, typename T>
HWY_INLINE void add_values(const T* v, std::int64_t stride, const float* weights, std::int64_t keys,
                           float* value) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  V sum[kCount];
  for (int i = 0; i < kCount; ++i) sum[i] = hn::LoadU(d, value + i * lanes);
  for (std::int64_t j = 0; j < keys; ++j, v += stride) {
    const V weight = hn::Set(d, weights[j]);
    for (int i = 0; i < kCount; ++i) sum[i] = hn::MulAdd(weight, simd::load_f32(d, v + i * lanes), sum[i]);
  }
  for (int i = 0; i < kCount; ++i) hn::StoreU(sum[i], d, value + i * lanes);
}

template <typename T>
void add_values_few(const Block<T>& block, const float* weights, std::int64_t head_dim_v, float* values) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t r = 0; r < block.rows; ++r) {
    const float* row = weights + r * kBlockKeys;
    float* value = values + r * head_dim_v;
    const std::int64_t stride = block.v.row_stride;
    std::int64_t c = 0;
    for (; c + 8 * lanes <= head_dim_v; c += 8 * lanes)
      add_values<8>(block.v.data + c, stride, row, block.keys, value + c);
    for (; c + lanes <= head_dim_v; c += lanes)
      add_values<1>(block.v.data + c, stride, row, block.keys, value + c);
    if (c < head_dim_v)
      for (std::int64_t j = 0; j < block.keys; ++j)
        for (std::int64_t i = c; i < head_dim_v; ++i)
          value[i] += row[j] * static_cast<float>(block.v.data[j * stride + i]);
  }
}

// Turns the scores of one row into weights relative to the largest score so far, and brings what the row
// carries to the same scale. Scores from `valid` on are of keys that the row does not see.
void soften(float* scores, std::int64_t valid, std::int64_t keys, float* largest, float* total, float* value,
            std::int64_t head_dim_v) {
  std::fill(scores + std::max<std::int64_t>(valid, 0), scores + keys, 0.0F);
  if (valid <= 0) return;
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const std::int64_t whole = valid / lanes * lanes;
  const auto rest = static_cast<std::size_t>(valid - whole);
  const V lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  V vmax = lowest;
  for (std::int64_t j = 0; j < whole; j += lanes) vmax = hn::Max(vmax, hn::LoadU(d, scores + j));
  if (rest > 0)
    vmax =
        hn::Max(vmax, hn::IfThenElse(hn::FirstN(d, rest), simd::load_f32_n(d, scores + whole, rest), lowest));
  const float before = *largest;
  const float now = std::max(before, hn::GetLane(hn::MaxOfLanes(d, vmax)));
  if (now > before) {
    // The first block finds no sum to bring along: its factor is 2^-infinity.
    const float factor = std::exp2(before - now);
    *total *= factor;
    multiply(value, head_dim_v, factor);
    *largest = now;
  }
  const V shift = hn::Set(d, now);
  V sum = hn::Zero(d);
  for (std::int64_t j = 0; j < whole; j += lanes) {
    const V weight = simd::exp2_flush(d, hn::Sub(hn::LoadU(d, scores + j), shift));
    hn::StoreU(weight, d, scores + j);
    sum = hn::Add(sum, weight);
  }
  if (rest > 0) {
    const V score = simd::load_f32_n(d, scores + whole, rest);
    const V weight = hn::IfThenElseZero(hn::FirstN(d, rest), simd::exp2_flush(d, hn::Sub(score, shift)));
    simd::store_f32_n(d, weight, scores + whole, rest);
    sum = hn::Add(sum, weight);
  }
  *total += hn::GetLane(hn::SumOfLanes(d, sum));
}

// Rows [begin, begin + rows) of the outputs of one head of keys.
void write_rows(const Problem& p, std::int64_t head_kv, std::int64_t begin, std::int64_t rows,
                const Running& running) {
  for (std::int64_t r = 0; r < rows; ++r)
    // No keys, no weights: the output is 0.
    multiply(running.value + r * p.head_dim_v, p.head_dim_v,
             running.total[r] == 0.0F ? 0.0F : 1.0F / running.total[r]);
  store_rows(p, running.value, p.head_dim_v, p.out, head_kv, begin, rows);
  if (p.logsumexp.data == nullptr) return;
  for (std::int64_t r = 0; r < rows; ++r) {
    const double total = running.total[r];  // without keys 0, whose logarithm is -infinity
    const double logsumexp = static_cast<double>(running.largest[r]) * std::numbers::ln2 + std::log(total);
    static_cast<float*>(p.logsumexp.data)[p.row_offset(p.logsumexp, head_kv, begin + r)] =
        static_cast<float>(logsumexp);
  }
}

struct Workspace {
  float* q;        // (rows, head_dim)
  float* scores;   // (rows, kBlockKeys)
  float* running;  // Running
  float* gemm;     // for the product; few rows: keys and values whose channels do not lie side by side

  Workspace(const Problem& p, float* at) {
    const std::int64_t rows = largest_block(p);
    q = at;
    scores = q + aligned(rows * p.head_dim);
    running = scores + rows * kBlockKeys;
    gemm = running + Running::floats(rows, p.head_dim_v);
  }
};

// Copies keys or values of a block into f32 with channels side by side.
template <typename T>
Strided<const float> gather(Strided<const T> from, std::int64_t keys, std::int64_t width, float* to) {
  simd::load_tile(from.data, from.row_stride, from.column_stride, keys, width, to, width);
  return {to, width, 1};
}

template <typename T>
void run_block_few(const Problem& p, const Block<T>& block, const Workspace& w, const Running& running,
                   const std::int64_t* valid) {
  score_few(block, w.q, p.head_dim, w.scores);
  for (std::int64_t r = 0; r < block.rows; ++r)
    soften(w.scores + r * kBlockKeys, valid[r], block.keys, running.largest + r, running.total + r,
           running.value + r * p.head_dim_v, p.head_dim_v);
  add_values_few(block, w.scores, p.head_dim_v, running.value);
}

template <typename T>
void run_task_of(const Problem& p, const Plan& plan, std::int64_t task, float* workspace, float* partials) {
  const std::int64_t split = task % plan.splits;
  const std::int64_t block_index = task / plan.splits;
  const std::int64_t head_kv = block_index / plan.row_blocks;
  const std::int64_t begin = block_index % plan.row_blocks * kBlockRows;
  const std::int64_t rows = std::min(kBlockRows, plan.rows - begin);
  const Workspace w(p, workspace);
  const Running running(
      plan.splits == 1 ? w.running : partials + task * Running::floats(largest_block(p), p.head_dim_v),
      largest_block(p));
  std::fill_n(running.largest, rows, -std::numeric_limits<float>::infinity());
  std::fill_n(running.total, rows, 0.0F);
  std::fill_n(running.value, rows * p.head_dim_v, 0.0F);
  load_rows(p, p.q, p.head_dim, head_kv, begin, rows, w.q);
  multiply(w.q, rows * p.head_dim, static_cast<float>(p.scale * std::numbers::log2e));

  const T* k = static_cast<const T*>(p.k.data) + head_kv * p.k.head_stride;
  const T* v = static_cast<const T*>(p.v.data) + head_kv * p.v.head_stride;
  const std::int64_t seen = p.visible((begin + rows - 1) / p.group);
  const std::int64_t end = seen * (split + 1) / plan.splits;
  for (std::int64_t j = seen * split / plan.splits; j < end; j += kBlockKeys) {
    const Block<T> block{.rows = rows,
                         .keys = std::min(kBlockKeys, end - j),
                         .k = {k + j * p.k.position_stride, p.k.position_stride, p.k.channel_stride},
                         .v = {v + j * p.v.position_stride, p.v.position_stride, p.v.channel_stride}};
    const auto valid = [&](std::int64_t r) {
      return std::min(block.keys, p.visible((begin + r) / p.group) - j);
    };
    if (rows <= kFewRows) {
      std::int64_t valid_of[kFewRows];
      for (std::int64_t r = 0; r < rows; ++r) valid_of[r] = valid(r);
      if (p.k.channel_stride == 1 && p.v.channel_stride == 1) {
        run_block_few(p, block, w, running, valid_of);
      } else {
        const Block<float> dense{
            .rows = rows,
            .keys = block.keys,
            .k = gather(block.k, block.keys, p.head_dim, w.gemm),
            .v = gather(block.v, block.keys, p.head_dim_v, w.gemm + aligned(kBlockKeys * p.head_dim))};
        run_block_few(p, dense, w, running, valid_of);
      }
      continue;
    }
    // Rows before `first` see no key of this block.
    std::int64_t first = 0;
    if (p.causal) first = std::clamp<std::int64_t>((j - (p.keys - p.queries)) * p.group - begin, 0, rows);
    const std::int64_t active = rows - first;
    float* scores = w.scores + first * kBlockKeys;
    simd::gemm(active, block.keys, p.head_dim, Strided<const float>{w.q + first * p.head_dim, p.head_dim, 1},
               Strided<const T>{block.k.data, block.k.column_stride, block.k.row_stride},
               Strided<float>{scores, kBlockKeys, 1}, false, w.gemm);
    for (std::int64_t r = first; r < rows; ++r)
      soften(w.scores + r * kBlockKeys, valid(r), block.keys, running.largest + r, running.total + r,
             running.value + r * p.head_dim_v, p.head_dim_v);
    simd::gemm(active, p.head_dim_v, block.keys, Strided<const float>{scores, kBlockKeys, 1}, block.v,
               Strided<float>{running.value + first * p.head_dim_v, p.head_dim_v, 1}, true, w.gemm);
  }
  if (plan.splits == 1) write_rows(p, head_kv, begin, rows, running);
}

void task_of(const Problem& p, const Plan& plan, std::int64_t task, float* workspace, float* partials) {
  switch (p.k.dtype) {
    case DType::bf16: return run_task_of<bf16>(p, plan, task, workspace, partials);
    case DType::f16: return run_task_of<f16>(p, plan, task, workspace, partials);
    default: return run_task_of<float>(p, plan, task, workspace, partials);
  }
}

// Into the first split of the block.
void merge_block(const Problem& p, const Plan& plan, std::int64_t block, float* partials) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const std::int64_t begin = block % plan.row_blocks * kBlockRows;
  const std::int64_t rows = std::min(kBlockRows, plan.rows - begin);
  const std::int64_t floats = Running::floats(largest_block(p), p.head_dim_v);
  float* first = partials + block * plan.splits * floats;
  const Running all(first, largest_block(p));
  for (std::int64_t s = 1; s < plan.splits; ++s) {
    const Running part(first + s * floats, largest_block(p));
    for (std::int64_t r = 0; r < rows; ++r) {
      if (part.total[r] == 0.0F) continue;  // saw no key
      const float now = std::max(all.largest[r], part.largest[r]);
      const float scale_all = std::exp2(all.largest[r] - now);
      const float scale_part = std::exp2(part.largest[r] - now);
      all.largest[r] = now;
      all.total[r] = all.total[r] * scale_all + part.total[r] * scale_part;
      float* to = all.value + r * p.head_dim_v;
      const float* from = part.value + r * p.head_dim_v;
      std::int64_t c = 0;
      for (; c + lanes <= p.head_dim_v; c += lanes) {
        const V mine = hn::Mul(hn::LoadU(d, to + c), hn::Set(d, scale_all));
        hn::StoreU(hn::MulAdd(hn::LoadU(d, from + c), hn::Set(d, scale_part), mine), d, to + c);
      }
      for (; c < p.head_dim_v; ++c) to[c] = to[c] * scale_all + from[c] * scale_part;
    }
  }
  write_rows(p, block / plan.row_blocks, begin, rows, all);
}

}  // namespace krait::attention_kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::attention_kernels {

HWY_EXPORT(task_of);
HWY_EXPORT(merge_block);

std::int64_t workspace_floats(const Problem& p) {
  const std::int64_t rows = largest_block(p);
  std::int64_t products = 0;
  if (rows > kFewRows)
    products = std::max(gemm_workspace(rows, kBlockKeys, p.head_dim),
                        gemm_workspace(rows, p.head_dim_v, kBlockKeys));
  else if (p.k.channel_stride != 1 || p.v.channel_stride != 1)
    products = aligned(kBlockKeys * p.head_dim) + kBlockKeys * p.head_dim_v;
  return aligned(rows * p.head_dim) + rows * kBlockKeys + Running::floats(rows, p.head_dim_v) +
         aligned(products);
}

std::int64_t partial_floats(const Problem& p, const Plan& plan) {
  return plan.splits == 1 ? 0 : plan.tasks(p) * Running::floats(largest_block(p), p.head_dim_v);
}

void run_task(const Problem& problem, const Plan& plan, std::int64_t task, float* workspace,
              float* partials) {
  HWY_DYNAMIC_DISPATCH(task_of)(problem, plan, task, workspace, partials);
}

void merge(const Problem& problem, const Plan& plan, std::int64_t block, float* partials) {
  HWY_DYNAMIC_DISPATCH(merge_block)(problem, plan, block, partials);
}

}  // namespace krait::attention_kernels
#endif
