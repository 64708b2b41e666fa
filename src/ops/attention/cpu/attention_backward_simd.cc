// The backward over blocks of rows and keys (Dao et al. 2022, "FlashAttention", algorithm 4): the weights of
// a block are recomputed from the scores and the rows' logsumexp, in units of log2 as in the forward. Sums of
// dk and dv are held with their channels as rows, so that both products of a block read its weights as they
// lie.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/attention/cpu/attention_backward_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstddef>
#include <numbers>

#include "core/simd/convert-inl.h"
#include "core/simd/gemm-inl.h"
#include "core/simd/gemm.h"
#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "ops/attention/cpu/rows-inl.h"
#include "ops/attention/kernels.h"

#ifndef KRAIT_OPS_ATTENTION_CPU_ATTENTION_BACKWARD_SIMD_ONCE
#define KRAIT_OPS_ATTENTION_CPU_ATTENTION_BACKWARD_SIMD_ONCE
namespace krait::attention_kernels {

// Sums of one task, where wanted: for each block of keys, dk (head_dim, kBlockKeys) and dv (head_dim_v,
// kBlockKeys).
struct KeySums {
  float* dk;
  float* dv;

  KeySums(const Problem& p, const Gradients& g, float* at) : dk(at), dv(at + dk_floats(p, g)) {}
  static std::int64_t floats(const Problem& p, const Gradients& g) {
    return dk_floats(p, g) + (g.dv.data != nullptr ? all_keys(p) * p.head_dim_v : 0);
  }

 private:
  static std::int64_t all_keys(const Problem& p) {
    return (p.keys + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
  }
  static std::int64_t dk_floats(const Problem& p, const Gradients& g) {
    return g.dk.data != nullptr ? all_keys(p) * p.head_dim : 0;
  }
};

struct BackwardWorkspace {
  float* q;         // (rows, head_dim), times the scale and log2(e)
  float* dout;      // (rows, head_dim_v)
  float* dq;        // (rows, head_dim)
  float* out;       // (head_dim_v)
  float* shift;     // (rows) the logsumexp in units of log2
  float* mean;      // (rows) dout . out, which is the weighted mean of a row's dweights
  float* weights;   // (rows, kBlockKeys)
  float* dweights;  // (rows, kBlockKeys); turned into the gradient of the scores
  float* k;         // (kBlockKeys, head_dim)
  float* v;         // (kBlockKeys, head_dim_v)
  float* gemm;
  std::int64_t floats;

  BackwardWorkspace(const Problem& p, float* workspace) {
    std::int64_t at = 0;
    const auto next = [&](std::int64_t count) {
      float* part = workspace == nullptr ? nullptr : workspace + at;
      at += aligned(count);
      return part;
    };
    const std::int64_t rows = largest_block(p);
    q = next(rows * p.head_dim);
    dout = next(rows * p.head_dim_v);
    dq = next(rows * p.head_dim);
    out = next(p.head_dim_v);
    shift = next(rows);
    mean = next(rows);
    weights = next(rows * kBlockKeys);
    dweights = next(rows * kBlockKeys);
    k = next(kBlockKeys * p.head_dim);
    v = next(kBlockKeys * p.head_dim_v);
    const std::int64_t width = std::max(p.head_dim, p.head_dim_v);
    gemm = next(std::max({gemm_workspace(rows, kBlockKeys, width), gemm_workspace(width, kBlockKeys, rows),
                          gemm_workspace(rows, width, kBlockKeys)}));
    floats = at;
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

float dot(const float* a, const float* b, std::int64_t n) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  V sum = hn::Zero(d);
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) sum = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sum);
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// What the rows of a task's block bring to every block of keys.
void load_block(const Problem& p, const Gradients& g, std::int64_t head_kv, std::int64_t begin,
                std::int64_t rows, const BackwardWorkspace& w) {
  load_rows(p, p.q, p.head_dim, head_kv, begin, rows, w.q);
  multiply(w.q, rows * p.head_dim, static_cast<float>(p.scale * std::numbers::log2e));
  load_rows(p, g.dout, p.head_dim_v, head_kv, begin, rows, w.dout);
  std::fill_n(w.dq, rows * p.head_dim, 0.0F);
  for (std::int64_t r = 0; r < rows; ++r) {
    const float logsumexp =
        static_cast<const float*>(p.logsumexp.data)[p.row_offset(p.logsumexp, head_kv, begin + r)];
    w.shift[r] = static_cast<float>(static_cast<double>(logsumexp) * std::numbers::log2e);
    load_rows(p, p.out, p.head_dim_v, head_kv, begin + r, 1, w.out);
    w.mean[r] = dot(w.dout + r * p.head_dim_v, w.out, p.head_dim_v);
  }
}

// The weights of one row from its scores: 0 from key `valid` on, which the row does not see.
void weigh(float* scores, std::int64_t valid, std::int64_t keys, float shift) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const V minus = hn::Set(d, -shift);
  std::int64_t j = 0;
  for (; j + lanes <= valid; j += lanes)
    hn::StoreU(simd::exp2_flush(d, hn::Add(hn::LoadU(d, scores + j), minus)), d, scores + j);
  if (j < valid) {
    const auto rest = static_cast<std::size_t>(valid - j);
    const V weight = simd::exp2_flush(d, hn::Add(simd::load_f32_n(d, scores + j, rest), minus));
    simd::store_f32_n(d, weight, scores + j, rest);
  }
  std::fill(scores + valid, scores + keys, 0.0F);
}

// The gradient of one row's scores from those of its weights.
void soften_backward(const float* weights, float* dweights, std::int64_t valid, std::int64_t keys,
                     float mean) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t j = 0;
  for (; j + lanes <= valid; j += lanes) {
    const V centred = hn::Sub(hn::LoadU(d, dweights + j), hn::Set(d, mean));
    hn::StoreU(hn::Mul(hn::LoadU(d, weights + j), centred), d, dweights + j);
  }
  for (; j < valid; ++j) dweights[j] = weights[j] * (dweights[j] - mean);
  std::fill(dweights + valid, dweights + keys, 0.0F);
}

// Rows [begin, begin + rows) against keys [j, j + keys).
void run_block(const Problem& p, const Gradients& g, std::int64_t begin, std::int64_t rows, std::int64_t j,
               std::int64_t keys, const BackwardWorkspace& w, const KeySums& sums) {
  // Rows before `first` see no key of this block.
  std::int64_t first = 0;
  if (p.causal) first = std::clamp<std::int64_t>((j - (p.keys - p.queries)) * p.group - begin, 0, rows);
  const std::int64_t active = rows - first;
  const auto valid = [&](std::int64_t r) { return std::min(keys, p.visible((begin + r) / p.group) - j); };
  const Strided<const float> q{w.q + first * p.head_dim, p.head_dim, 1};
  const Strided<const float> dout{w.dout + first * p.head_dim_v, p.head_dim_v, 1};
  const auto transposed = [](Strided<const float> m) {
    return Strided<const float>{m.data, m.column_stride, m.row_stride};
  };

  float* weights = w.weights + first * kBlockKeys;
  simd::gemm(active, keys, p.head_dim, q, Strided<const float>{w.k, 1, p.head_dim},
             Strided<float>{weights, kBlockKeys, 1}, false, w.gemm);
  for (std::int64_t r = first; r < rows; ++r) weigh(w.weights + r * kBlockKeys, valid(r), keys, w.shift[r]);
  if (g.dv.data != nullptr)
    simd::gemm(p.head_dim_v, keys, active, transposed(dout), Strided<const float>{weights, kBlockKeys, 1},
               Strided<float>{sums.dv + j * p.head_dim_v, kBlockKeys, 1}, true, w.gemm);
  if (g.dq.data == nullptr && g.dk.data == nullptr) return;

  float* dscores = w.dweights + first * kBlockKeys;
  simd::gemm(active, keys, p.head_dim_v, dout, Strided<const float>{w.v, 1, p.head_dim_v},
             Strided<float>{dscores, kBlockKeys, 1}, false, w.gemm);
  for (std::int64_t r = first; r < rows; ++r)
    soften_backward(w.weights + r * kBlockKeys, w.dweights + r * kBlockKeys, valid(r), keys, w.mean[r]);
  if (g.dk.data != nullptr)
    simd::gemm(p.head_dim, keys, active, transposed(q), Strided<const float>{dscores, kBlockKeys, 1},
               Strided<float>{sums.dk + j * p.head_dim, kBlockKeys, 1}, true, w.gemm);
  if (g.dq.data != nullptr)
    simd::gemm(active, p.head_dim, keys, Strided<const float>{dscores, kBlockKeys, 1},
               Strided<const float>{w.k, p.head_dim, 1},
               Strided<float>{w.dq + first * p.head_dim, p.head_dim, 1}, true, w.gemm);
}

void backward_task(const Problem& p, const Gradients& g, const BackwardPlan& plan, std::int64_t task,
                   float* workspace, float* all_sums) {
  const std::int64_t head_kv = task / plan.splits;
  const BackwardWorkspace w(p, workspace);
  const std::int64_t floats = KeySums::floats(p, g);
  std::fill_n(all_sums + task * floats, floats, 0.0F);
  const KeySums sums(p, g, all_sums + task * floats);
  const auto load_keys = [&](const Operand& from, std::int64_t j, std::int64_t keys, std::int64_t width,
                             float* to) {
    simd::load_tile(from.dtype, from.data, head_kv * from.head_stride + j * from.position_stride,
                    from.position_stride, from.channel_stride, keys, width, to, width);
  };
  for (std::int64_t block = task % plan.splits; block < plan.row_blocks; block += plan.splits) {
    const std::int64_t begin = block * kBlockRows;
    const std::int64_t rows = std::min(kBlockRows, p.queries * p.group - begin);
    load_block(p, g, head_kv, begin, rows, w);
    const std::int64_t seen = p.visible((begin + rows - 1) / p.group);
    for (std::int64_t j = 0; j < seen; j += kBlockKeys) {
      const std::int64_t keys = std::min(kBlockKeys, seen - j);
      load_keys(p.k, j, keys, p.head_dim, w.k);
      load_keys(p.v, j, keys, p.head_dim_v, w.v);
      run_block(p, g, begin, rows, j, keys, w, sums);
    }
    if (g.dq.data == nullptr) continue;
    multiply(w.dq, rows * p.head_dim, static_cast<float>(p.scale));
    store_rows(p, w.dq, p.head_dim, g.dq, head_kv, begin, rows);
  }
}

void add(float* sum, const float* part, std::int64_t n) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(hn::Add(hn::LoadU(d, sum + i), hn::LoadU(d, part + i)), d, sum + i);
  for (; i < n; ++i) sum[i] += part[i];
}

void finish_keys_of(const Problem& p, const Gradients& g, const BackwardPlan& plan, std::int64_t block,
                    float* all_sums) {
  const std::int64_t head_kv = block / plan.key_blocks;
  const std::int64_t j = block % plan.key_blocks * kBlockKeys;
  const std::int64_t keys = std::min(kBlockKeys, p.keys - j);
  const std::int64_t floats = KeySums::floats(p, g);
  const KeySums sums(p, g, all_sums + head_kv * plan.splits * floats);
  const auto finish = [&](float* sum, std::int64_t width, const Operand& to, float factor) {
    if (to.data == nullptr) return;
    sum += j * width;
    for (std::int64_t s = 1; s < plan.splits; ++s) add(sum, sum + s * floats, width * kBlockKeys);
    if (factor != 1.0F) multiply(sum, width * kBlockKeys, factor);
    simd::store_tile(sum, kBlockKeys, to.dtype, to.data, head_kv * to.head_stride + j * to.position_stride,
                     to.channel_stride, to.position_stride, width, keys);
  };
  // q was multiplied by the scale and log2(e).
  finish(sums.dk, p.head_dim, g.dk, static_cast<float>(std::numbers::ln2));
  finish(sums.dv, p.head_dim_v, g.dv, 1.0F);
}

}  // namespace krait::attention_kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::attention_kernels {

HWY_EXPORT(backward_task);
HWY_EXPORT(finish_keys_of);

std::int64_t backward_workspace_floats(const Problem& problem) {
  return BackwardWorkspace(problem, nullptr).floats;
}

std::int64_t backward_sum_floats(const Problem& problem, const BackwardPlan& plan,
                                 const Gradients& gradients) {
  return plan.tasks(problem) * KeySums::floats(problem, gradients);
}

void run_backward_task(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan,
                       std::int64_t task, float* workspace, float* sums) {
  HWY_DYNAMIC_DISPATCH(backward_task)(problem, gradients, plan, task, workspace, sums);
}

void finish_keys(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan,
                 std::int64_t block, float* sums) {
  HWY_DYNAMIC_DISPATCH(finish_keys_of)(problem, gradients, plan, block, sums);
}

}  // namespace krait::attention_kernels
#endif
