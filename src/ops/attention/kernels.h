// What the paths of attention share: a validated problem, how it is divided, and the entry points.
#pragma once

#include <algorithm>
#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/dtype.h"

namespace krait::attention_kernels {

// (length, heads, width) in memory; strides in elements.
struct Operand {
  void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
  std::int64_t position_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t channel_stride = 1;
};

struct Problem {
  std::int64_t queries = 0;  // Lq
  std::int64_t keys = 0;     // Lk
  std::int64_t heads_kv = 0;
  std::int64_t group = 0;  // query heads that share a head of keys and values: H / Hkv
  std::int64_t head_dim = 0;
  std::int64_t head_dim_v = 0;
  bool causal = false;
  double scale = 1.0;
  Operand q;
  Operand k;
  Operand v;
  Operand out;
  Operand logsumexp;  // (length, heads): no channels

  // How many keys query i sees.
  [[nodiscard]] std::int64_t visible(std::int64_t query) const {
    return causal ? keys - queries + query + 1 : keys;
  }

  // A row is one query of one head. The rows of a head of keys are all queries of its group, ordered by query
  // and then by head: row r is query r / group of head r % group. Where it begins in q, out or the like:
  [[nodiscard]] std::int64_t row_offset(const Operand& o, std::int64_t head_kv, std::int64_t row) const {
    return row / group * o.position_stride + (head_kv * group + row % group) * o.head_stride;
  }
};

// What the backward has beside the problem, whose out and logsumexp it reads.
struct Gradients {
  Operand dout;
  Operand dq;  // each may be absent
  Operand dk;
  Operand dv;
};

// What the fast paths hold at a time. Buffers of floats are laid out in whole cache lines.
inline constexpr std::int64_t kBlockRows = 168;
inline constexpr std::int64_t kBlockKeys = 128;
[[nodiscard]] inline std::int64_t largest_block(const Problem& p) {
  return std::min(kBlockRows, p.queries * p.group);
}
[[nodiscard]] inline std::int64_t aligned(std::int64_t floats) { return (floats + 15) / 16 * 16; }

// f64 throughout.
void reference(const Problem& problem);
void reference_backward(const Problem& problem, const Gradients& gradients);

// The forward. A task is a block of rows against one of
// `splits` equal parts of the keys that these rows see. With one split a task writes its outputs; with more
// it leaves partial results, which `merge` joins. Nothing here depends on the number of threads.
struct Plan {
  std::int64_t rows = 0;        // of one head of keys: queries * group
  std::int64_t row_blocks = 0;  // of at most kBlockRows
  std::int64_t splits = 1;

  [[nodiscard]] std::int64_t tasks(const Problem& p) const { return p.heads_kv * row_blocks * splits; }
};
[[nodiscard]] Plan make_plan(const Problem& problem);

// Floats for one task at a time, and for all partial results of a plan (0 for one split). Both buffers are
// aligned to 64 bytes.
[[nodiscard]] std::int64_t workspace_floats(const Problem& problem);
[[nodiscard]] std::int64_t partial_floats(const Problem& problem, const Plan& plan);

void run_task(const Problem& problem, const Plan& plan, std::int64_t task, float* workspace, float* partials);
// Joins the splits of row block `block` of all heads of keys, 0 <= block < heads_kv * row_blocks, and writes
// its outputs.
void merge(const Problem& problem, const Plan& plan, std::int64_t block, float* partials);

// The backward. A task is every `splits`-th block of rows of one head of keys, against all keys that these
// rows see. It writes its rows of dq and leaves its sums of dk and dv, which `finish_keys` adds up over the
// splits in order. Nothing here depends on the number of threads.
struct BackwardPlan {
  std::int64_t row_blocks = 0;  // of one head of keys, of at most kBlockRows
  std::int64_t splits = 1;
  std::int64_t key_blocks = 0;  // of at most kBlockKeys

  [[nodiscard]] std::int64_t tasks(const Problem& p) const { return p.heads_kv * splits; }
};
[[nodiscard]] BackwardPlan make_backward_plan(const Problem& problem);

// Floats for one task at a time, and for the sums of all tasks. Both buffers are aligned to 64 bytes.
[[nodiscard]] std::int64_t backward_workspace_floats(const Problem& problem);
[[nodiscard]] std::int64_t backward_sum_floats(const Problem& problem, const BackwardPlan& plan,
                                               const Gradients& gradients);

void run_backward_task(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan,
                       std::int64_t task, float* workspace, float* sums);
// Block `block` of the keys of all heads, 0 <= block < heads_kv * key_blocks.
void finish_keys(const Problem& problem, const Gradients& gradients, const BackwardPlan& plan,
                 std::int64_t block, float* sums);

// On a GPU: f32, bf16 and f16 in any mixture, any strides and widths.
namespace gpu {

void forward(Context& ctx, const Problem& problem);
void backward(Context& ctx, const Problem& problem, const Gradients& gradients);

// How the forward is divided. Up to 16 rows, and widths that fit, go to blocks of 1 or kFewRows rows with all
// channels; else blocks are tiles of 64 rows and 64 channels of the values. Nothing depends on the device.
inline constexpr int kFewRows = 8;
struct GpuPlan {
  std::int64_t rows_of_block = 64;
  std::int64_t channels_of_block = 64;
  std::int64_t row_blocks = 0;
  std::int64_t channel_blocks = 1;
  std::int64_t splits = 1;         // parts of the keys, joined in order
  std::int64_t keys_of_split = 0;  // a multiple of 128
  bool packed_keys = false;        // 16 bytes of k, of v, can be loaded at once
  bool packed_values = false;

  [[nodiscard]] std::int64_t tasks(std::int64_t heads_kv) const {
    return row_blocks * channel_blocks * heads_kv * splits;
  }
};
[[nodiscard]] GpuPlan make_gpu_plan(const Problem& problem);

}  // namespace gpu

}  // namespace krait::attention_kernels
