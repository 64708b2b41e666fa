// What the paths of norm share: a validated problem over rows, and their entry points.
#pragma once

#include <cstddef>
#include <cstdint>

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

 private:
  std::byte* data_ = nullptr;
  DType dtype_ = DType::f32;
  std::int64_t channel_stride_ = 1;
  Dims sizes_;    // of the leading dimensions, neighbours merged where the strides allow it
  Dims strides_;  // in bytes
};

struct Problem {
  NormKind kind = NormKind::rms;
  std::int64_t rows = 0;
  std::int64_t channels = 0;    // > 0
  std::int64_t group_size = 0;  // divides channels
  double eps = 0.0;
  bool norm_before_gate = true;
  Rows x;
  Rows residual;
  Rows z;
  Rows weight;  // one row
  Rows bias;    // one row
  Rows out;
  Rows residual_out;
};

// f64 throughout.
void reference(const Problem& problem);

// Rows [begin, end). No operand is f64; weight and bias, where given, are contiguous f32. `workspace` has
// workspace_floats(channels) floats, aligned to 64 bytes.
void simd(const Problem& problem, std::int64_t begin, std::int64_t end, float* workspace);
[[nodiscard]] std::int64_t workspace_floats(std::int64_t channels);

}  // namespace krait::norm_kernels
