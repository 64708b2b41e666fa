// The paths of linear, one file each. All take what linear.cc has validated and flattened.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

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
  Tensor addend{};  // (rows, out) or absent: what out is first, for gpu::cublaslt alone
};

void reference(Context& ctx, const Problem& problem);

// Needs weight.stride(1) == 1.
void gemv(Context& ctx, const Problem& problem);
void gemm(Context& ctx, const Problem& problem);

// Needs a weight without gaps, of a dtype that onednn_products() names.
void onednn(Context& ctx, const Problem& problem);

// bias[o] += sum_r dout[r, o], for dout (rows, out) and bias (out). Any dtypes and strides, sums in f64.
void column_sums_reference(const Tensor& dout, const Tensor& bias);
// The same for dout of f32, bf16 or f16 and bias of f32.
void column_sums(Context& ctx, const Tensor& dout, const Tensor& bias);

// `t` (..., n) as (rows, n) where its strides allow one stride for all leading sizes.
std::optional<Tensor> rows_view(const Tensor& t);
// The same of a copy from the pool where they do not.
Tensor as_rows(Context& ctx, const Tensor& t);

// Whether a matrix has rows or columns without gaps, which oneDNN takes as they lie in memory.
[[nodiscard]] bool without_gaps(const Tensor& t);
// `t` as `dtype` and without gaps: itself, or a copy from the pool.
Tensor operand(Context& ctx, const Tensor& t, DType dtype);

// `bias` as contiguous f32: itself, or a copy from the pool; absent stays absent.
Tensor bias_as_f32(Context& ctx, const Tensor& bias);

// The path of `automatic` in the backward: those of the forward for many rows, whatever their number.
[[nodiscard]] LinearPath choose_backward_path(std::int64_t rows, std::int64_t in, std::int64_t out,
                                              DType weight, OnednnProducts onednn);

// How gemm divides C (m, n) among threads: `rows` x `columns` parts, at most one for each thread.
struct Grid {
  std::int64_t rows = 1;
  std::int64_t columns = 1;
  friend bool operator==(const Grid&, const Grid&) = default;
};
[[nodiscard]] Grid choose_grid(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t threads);

// On a GPU: any strides, f32, bf16 and f16 in any mixture, sums in f32.
namespace gpu {

// Made for few rows: weights are read once for every 16 of them. x is not rounded.
void gemv(Context& ctx, const Problem& problem);
// The same for up to 16 rows of x of the weight's 16-bit dtype, on tensor cores. False where sizes or layouts
// are not made for it.
bool few_rows(Context& ctx, const Problem& problem);
// Adds sums of up to 192 terms, which memory bounds: out is read and written once. 16-bit x, weight and out
// of one dtype. False where sizes or layouts are not made for it.
bool add_short_sums(Context& ctx, const Problem& problem);
// x is rounded to the dtype of the weight. False where the plain kernel computed what cuBLASLt has no kernel
// for.
bool cublaslt(Context& ctx, const Problem& problem);
// One kernel for everything, far from the speed of the others. Nothing is rounded but the result.
void plain(Context& ctx, const Problem& problem);

void column_sums(Context& ctx, const Tensor& dout, const Tensor& bias);

// A kernel that cuBLASLt proposes for a product: how often its tiles fill the multiprocessors (undivided
// sums), and among how many blocks it divides a sum.
struct ProductProposal {
  float waves = 0.0F;
  int splits = 1;
};
struct ProductSize {
  std::int64_t rows = 0;
  std::int64_t in = 0;
  std::int64_t out = 0;
  DType out_dtype = DType::f32;
};
// The place of the proposal to take, of those in an order of preference. cuBLASLt's leaves out what storing a
// tile takes, which counts where sums are short.
[[nodiscard]] std::size_t choose_proposal(const ProductSize& size, std::span<const ProductProposal> proposals,
                                          int multiprocessors);

// How gemv divides the weight. A unit is the kGemvRows rows of it that a warp takes with each `lanes` of its
// lanes; `splits` of the kGemvWarps warps of a block share a unit and take steps along `in` in turn.
inline constexpr int kGemvRows = 4;
inline constexpr int kGemvWarps = 8;
// What warps that share units exchange, in shared memory.
[[nodiscard]] constexpr std::int64_t gemv_exchange_bytes(std::int64_t rows_of_x) {
  return 2 * kGemvWarps * kGemvRows * rows_of_x * static_cast<std::int64_t>(sizeof(float));
}
// Blocks for which a multiprocessor has registers and shared memory.
[[nodiscard]] constexpr int gemv_blocks(std::int64_t rows_of_x) { return rows_of_x <= 4 ? 3 : 2; }
struct GemvPlan {
  int lanes = 32;          // 4, 8, 16 or 32
  int splits = 1;          // 1, 2, 4 or 8
  std::int64_t steps = 0;  // along `in`, of `lanes` pieces of 16 bytes
  std::int64_t tile = 0;   // steps whose x is in shared memory at a time
  std::int64_t units = 0;

  [[nodiscard]] int rows_of_unit() const { return kGemvRows * (32 / lanes); }
};
// `shared_memory`: what a block may ask for, in bytes.
[[nodiscard]] GemvPlan choose_gemv_plan(std::int64_t rows, std::int64_t in, std::int64_t out, DType weight,
                                        int multiprocessors, std::int64_t shared_memory);

}  // namespace gpu

}  // namespace krait::linear_detail
