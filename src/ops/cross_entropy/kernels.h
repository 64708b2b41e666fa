// The parts of cross_entropy and linear_cross_entropy that both use, and the paths.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/cross_entropy.h"

namespace krait::cross_entropy_detail {

// The targets of `count` tokens. On the CPU, contiguous i64, each ignore_index or in [0, vocabulary): throws
// where one is not. On a GPU, as they are: the kernels look at them.
Tensor checked_targets(Context& ctx, const Tensor& targets, std::int64_t count, std::int64_t vocabulary,
                       std::int64_t ignore_index, const char* op);
[[noreturn]] void fail_target(std::int64_t target, std::int64_t place, std::int64_t vocabulary,
                              std::int64_t ignore_index, const char* op);
void check_smoothing(double label_smoothing, const char* op);

struct Rows {
  Tensor logits;   // (T, V)
  Tensor targets;  // (T) of checked_targets
  std::int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  Tensor losses;     // (T) f32 or f64, contiguous
  Tensor logsumexp;  // (T), likewise
};

// Fills losses and logsumexp by the path that suits, and returns its name.
const char* run(Context& ctx, const Rows& rows);
// exp and log in f64.
void reference(Context& ctx, const Rows& rows);
// exp in f32 on f32, bf16 or f16 logits.
void simd(Context& ctx, const Rows& rows);

// The gradient of a loss by its logits: scale (softmax - target), 0 where the target is ignored.
struct GradientRows {
  Tensor logits;   // (T, V)
  Tensor targets;  // (T) of checked_targets
  std::int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  double scale = 1.0;
  Tensor logsumexp;  // (T) f32 or f64, contiguous
  Tensor dlogits;    // (T, V), may be logits itself
};
const char* run_backward(Context& ctx, const GradientRows& rows);
void reference_backward(Context& ctx, const GradientRows& rows);
void simd_backward(Context& ctx, const GradientRows& rows);

// On a GPU, where losses and logsumexp are f32. A target that is not allowed gives a loss and a gradient of
// NaN. Losses, and where dlogits is given the gradient in the same launch: 0 for all rows where `bad` (1) i64
// says that a target is not allowed.
void cuda(Context& ctx, const Rows& rows, const Tensor& dlogits = {}, double scale = 1.0,
          const Tensor& bad = {});
void cuda_backward(Context& ctx, const GradientRows& rows);
// (1) i64 on the device: how many targets are not allowed.
Tensor cuda_count_bad(Context& ctx, const Tensor& targets, std::int64_t vocabulary,
                      std::int64_t ignore_index);
// Queues the sums that mean and count come from, and then waits for them.
void cuda_add_up(Context& ctx, const Tensor& targets, std::int64_t vocabulary, std::int64_t ignore_index,
                 CrossEntropyResult& result);
void cuda_read_totals(Context& ctx, CrossEntropyResult& result, const char* op);

// mean and count from losses.
void finish(Context& ctx, const Tensor& targets, std::int64_t vocabulary, std::int64_t ignore_index,
            const char* op, CrossEntropyResult& result, bool read_later = false);

// The loss of one token from what its row of logits gave.
struct RowSums {
  double logsumexp = 0.0;
  double logits = 0.0;  // their sum; only needed with label smoothing
};
[[nodiscard]] constexpr double loss_of(const RowSums& sums, double target_logit, double smoothing,
                                       std::int64_t vocabulary) {
  if (smoothing == 0.0) return sums.logsumexp - target_logit;
  const double mean = sums.logits / static_cast<double>(vocabulary);
  return sums.logsumexp - (1.0 - smoothing) * target_logit - smoothing * mean;
}

}  // namespace krait::cross_entropy_detail
