// What the paths of attention share: a validated problem, how it is divided, and the entry points.
#pragma once

#include <cstdint>

#include "krait/core/dtype.h"

namespace krait::attention_kernels {

// (length, heads, width) in memory; strides in elements.
struct Operand {
  void* data = nullptr;
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

  // How many keys query i sees.
  [[nodiscard]] std::int64_t visible(std::int64_t query) const {
    return causal ? keys - queries + query + 1 : keys;
  }
};

// f64 throughout.
void reference(const Problem& problem);

// A row is one query of one head. The rows of a head of keys are all queries of its group, ordered by query
// and then by head: row r is query r / group of head r % group. A task is a block of rows against one of
// `splits` equal parts of the keys that these rows see. With one split a task writes its outputs; with more
// it leaves partial results, which `merge` joins. Nothing here depends on the number of threads.
struct Plan {
  std::int64_t rows = 0;        // of one head of keys: queries * group
  std::int64_t row_blocks = 0;  // of at most kBlockRows
  std::int64_t splits = 1;

  [[nodiscard]] std::int64_t tasks(const Problem& p) const { return p.heads_kv * row_blocks * splits; }
};
inline constexpr std::int64_t kBlockRows = 168;
[[nodiscard]] Plan make_plan(const Problem& problem);

// Floats for one task at a time, and for all partial results of a plan (0 for one split). Both buffers are
// aligned to 64 bytes.
[[nodiscard]] std::int64_t workspace_floats(const Problem& problem);
[[nodiscard]] std::int64_t partial_floats(const Problem& problem, const Plan& plan);

void run_task(const Problem& problem, const Plan& plan, std::int64_t task, float* workspace, float* partials);
// Joins the splits of row block `block` of all heads of keys, 0 <= block < heads_kv * row_blocks, and writes
// its outputs.
void merge(const Problem& problem, const Plan& plan, std::int64_t block, float* partials);

}  // namespace krait::attention_kernels
