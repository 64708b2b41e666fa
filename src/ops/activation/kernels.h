// The kernels of the activations, on one row at a time.
#pragma once

#include <cstdint>

#include "krait/ops/activation.h"

namespace krait::activation {

// Contiguous f32 rows; out may be any of the inputs.
void gated_silu_row(const float* x, const float* gate, float* out, std::int64_t n);
void gelu_row(const float* x, float* out, std::int64_t n, GeluKind kind);

template <typename T>
T gated_silu_reference(T x, T gate);
template <typename T>
T gelu_reference(T x, GeluKind kind);

}  // namespace krait::activation
