// The paths of linear, one file each. All take what linear.cc has validated and flattened.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/linear.h"

namespace krait::linear_detail {

struct Problem {
  Tensor x;       // (rows, in)
  Tensor weight;  // (out, in)
  Tensor bias;    // (out) or absent
  Tensor out;     // (rows, out)
  bool accumulate = false;
};

void reference(Context& ctx, const Problem& problem);

// Needs weight.stride(1) == 1.
void gemv(Context& ctx, const Problem& problem);
void gemm(Context& ctx, const Problem& problem);

// Needs weight.stride(0) == 1 or weight.stride(1) == 1, and a dtype that onednn_products() names.
void onednn(Context& ctx, const Problem& problem);

// `bias` as contiguous f32: itself, or a copy from the pool; absent stays absent.
Tensor bias_as_f32(Context& ctx, const Tensor& bias);

// How gemm divides C (m, n) among threads: `rows` x `columns` parts, at most one for each thread.
struct Grid {
  std::int64_t rows = 1;
  std::int64_t columns = 1;
  friend bool operator==(const Grid&, const Grid&) = default;
};
[[nodiscard]] Grid choose_grid(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t threads);

}  // namespace krait::linear_detail
