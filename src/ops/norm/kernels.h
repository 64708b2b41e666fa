// What the paths of norm share: a validated problem over rows, and their entry points.
#pragma once

#include <cstddef>
#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/norm.h"

namespace krait::norm_kernels {

// A tensor (..., C) seen as rows of C channels. Absent operands have no data.
class Rows {
 public:
  Rows() = default;
  explicit Rows(const Tensor& t);

  explicit operator bool() const { return data_ != nullptr; }
  [[nodiscard]] DType dtype() const { return dtype_; }
  [[nodiscard]] std::int64_t channel_stride() const { return channel_stride_; }  // in elements
  [[nodiscard]] void* row(std::int64_t index) const;
  // The leading dimensions, outermost first: sizes, and strides in bytes.
  [[nodiscard]] const Dims& sizes() const { return sizes_; }
  [[nodiscard]] const Dims& strides() const { return strides_; }

 private:
  std::byte* data_ = nullptr;
  DType dtype_ = DType::f32;
  std::int64_t channel_stride_ = 1;
  Dims sizes_;    // of the leading dimensions, neighbours merged where the strides allow it
  Dims strides_;  // in bytes
};

// What is normalised and how: the same for forward and backward.
struct Normalisation {
  NormKind kind = NormKind::rms;
  std::int64_t rows = 0;
  std::int64_t channels = 0;    // > 0
  std::int64_t group_size = 0;  // divides channels
  double eps = 0.0;
  bool norm_before_gate = true;
  Rows x;
  Rows z;
  Rows weight;  // one row
  Rows bias;    // one row
};

// On a GPU x may be absent where there is a residual.
struct Problem : Normalisation {
  Rows residual;
  Rows out;
  Rows residual_out;
};

struct BackwardProblem : Normalisation {
  Rows dout;
  Rows dresidual;
  Rows dx;
  Rows dx_rounded;  // on a GPU, in vectors alone
  Rows dz;
  Rows dweight;  // one row
  Rows dbias;    // one row
};

// f64 throughout.
void reference(const Problem& problem);
void reference(const BackwardProblem& problem);

// The floats of a row buffer: whole vectors of any target (at most 256 bytes).
[[nodiscard]] inline std::int64_t padded(std::int64_t channels) { return (channels + 63) / 64 * 64; }

// Rows [begin, end). No operand is f64; weight and bias, where given, are contiguous f32. `workspace` has
// kForwardRows * padded(channels) floats, aligned to 64 bytes.
inline constexpr std::int64_t kForwardRows = 2;
void simd(const Problem& problem, std::int64_t begin, std::int64_t end, float* workspace);

// Rows [begin, end) of the backward. No operand is f64; weight and bias, where given, are padded rows of f32.
// `dweight` and `dbias` are padded rows that receive the sums over these rows, or null; those of the problem
// are left alone. `workspace` has kBackwardRows * padded(channels) floats, aligned to 64 bytes.
inline constexpr std::int64_t kBackwardRows = 6;
void simd(const BackwardProblem& problem, std::int64_t begin, std::int64_t end, float* dweight, float* dbias,
          float* workspace);

// How a GPU walks the groups of rows. A group is the work of some warps, which hold it in registers in
// vectors of 8 channels; where that does not suit, of a block that reads it channel by channel.
struct GpuPlan {
  int vectors = 0;  // that a thread holds: 1, 2 or 4; 0: channel by channel
  int warps = 0;    // of a group
  int groups = 0;   // that a block works on side by side: more than 1 only where a warp is enough for each
};
// By the shape alone: the widest group in vectors is 8 * 32 * most_vectors * kMaxWarps channels.
inline constexpr int kMaxWarps = 16;
[[nodiscard]] GpuPlan choose_gpu_plan(std::int64_t group_size, int most_vectors);
// Vectors need channels side by side, addresses of whole vectors, and x, z and out of one dtype; with a
// residual (of that dtype or f32) or a gate, not both. The backward likewise, and no dbias with a gate.
[[nodiscard]] GpuPlan choose_gpu_plan(const Problem& problem);
[[nodiscard]] GpuPlan choose_gpu_plan(const BackwardProblem& problem);
// No operand is f64. The backward returns whether it went by vectors, and so wrote dx_rounded.
void cuda(Context& ctx, const Problem& problem, const GpuPlan& plan);
bool cuda(Context& ctx, const BackwardProblem& problem, const GpuPlan& plan);

}  // namespace krait::norm_kernels
