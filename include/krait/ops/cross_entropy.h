// cross_entropy: negative log likelihood of targets under softmax(logits), in nats.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

struct CrossEntropyArgs {
  Tensor logits;   // (T, V) f32, f64, bf16 or f16, any strides
  Tensor targets;  // (T) i64 or i32; ignore_index: no loss
  std::int64_t ignore_index = -100;
  double label_smoothing = 0.0;  // in [0, 1): that share of the target is spread evenly over V
};

struct CrossEntropyResult {
  Tensor losses;           // (T) f32 (f64 for f64 logits), 0 where ignored
  Tensor logsumexp;        // (T), likewise
  double mean = 0.0;       // over targets that are not ignored; 0 where there are none
  std::int64_t count = 0;  // of those targets
  Tensor totals;           // on a GPU, where mean and count are not read yet (read_totals)
};

// Sums are in f64. Throws where a target is neither ignore_index nor in [0, V). On a GPU targets are there
// too, and the host does not read them: the call ends by waiting for mean and count, and throws then. Until
// it does, the loss of a target that is not allowed is NaN.
CrossEntropyResult cross_entropy(Context& ctx, const CrossEntropyArgs& args);

struct LinearCrossEntropyArgs {
  Tensor x;        // (T, d) what the head would be applied to
  Tensor weight;   // (V, d)
  Tensor bias;     // (V), optional
  Tensor targets;  // (T)
  std::int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  std::int64_t block = 0;  // tokens whose logits exist at a time; 0: chosen from V and the device
};

// Head and loss fused over blocks of tokens: no more than `block` rows of logits exist at a time.
CrossEntropyResult linear_cross_entropy(Context& ctx, const LinearCrossEntropyArgs& args);

struct CrossEntropyBackwardArgs {
  Tensor logits;   // (T, V), as in the forward
  Tensor targets;  // (T)
  std::int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  Tensor logsumexp;    // (T) of the forward; absent: computed anew
  double scale = 1.0;  // gradient of each loss: 1 / count for that of the mean
  Tensor dlogits;      // (T, V), written: scale (softmax - target), 0 where ignored; may be logits itself
};

// On a GPU the call waits for nothing, and the gradient of a token whose target is not allowed is NaN.
void cross_entropy_backward(Context& ctx, const CrossEntropyBackwardArgs& args);

struct LinearCrossEntropyBackwardArgs {
  LinearCrossEntropyArgs forward;
  double scale = 1.0;  // gradient of each loss
  Tensor dx;           // (T, d), written where given; may be x itself
  Tensor dweight;      // (V, d) f32, added to where given
  Tensor dbias;        // (V) f32, likewise
  // On a GPU: return without waiting for mean and count, which read_totals brings.
  bool read_later = false;
};

// Losses and gradients in one pass: a block of logits is computed once, turned into its gradient in place
// and multiplied with weight and x before the next one exists. Returns what linear_cross_entropy returns. On
// a GPU with x and weight in bf16, the gradient of the logits is rounded to bf16 for those products; where a
// target is not allowed, which the host sees at the end alone, dweight and dbias are left as they were.
CrossEntropyResult linear_cross_entropy_backward(Context& ctx, const LinearCrossEntropyBackwardArgs& args);

// Waits for mean and count of a result that was returned without them. Throws, naming `op`, where a target is
// not allowed.
void read_totals(Context& ctx, CrossEntropyResult& result, const char* op);

}  // namespace krait
