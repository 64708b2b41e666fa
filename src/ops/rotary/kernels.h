// What the paths of rotary share: a validated problem, and their entry points.
#pragma once

#include <cstdint>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/dtype.h"

namespace krait::rotary_kernels {

struct Problem {
  void* x = nullptr;
  DType dtype = DType::f32;
  std::int64_t tokens = 0;
  std::int64_t heads = 0;
  std::int64_t token_stride = 0;  // in elements
  std::int64_t head_stride = 0;
  std::int64_t channel_stride = 1;
  bool interleaved = false;
  std::vector<double> positions;    // (tokens), negated to turn backwards
  std::vector<double> frequencies;  // (dim / 2), radians for each position

  [[nodiscard]] std::int64_t pairs() const { return static_cast<std::int64_t>(frequencies.size()); }
};

// f64 throughout.
void reference(const Problem& problem);

// Tokens [begin, end); dtype is not f64. `workspace` has workspace_floats(pairs) floats, aligned to 64 bytes.
void simd(const Problem& problem, std::int64_t begin, std::int64_t end, float* workspace);
[[nodiscard]] std::int64_t workspace_floats(std::int64_t pairs);

// On a GPU, where positions stay on the device. x (T, H, head_dim) f32, bf16 or f16.
void turn_cuda(Context& ctx, const Tensor& x, const Tensor& positions, const std::vector<double>& frequencies,
               bool interleaved, bool inverse);

}  // namespace krait::rotary_kernels
