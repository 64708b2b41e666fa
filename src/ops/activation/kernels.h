// The kernels of the activations, on one row at a time.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/ops/activation.h"

namespace krait::activation {

// Contiguous f32 rows; outputs may be any of the inputs, but not each other.
void gated_silu_row(const float* x, const float* gate, float* out, std::int64_t n);
void gelu_row(const float* x, float* out, std::int64_t n, GeluKind kind);
void gated_silu_backward_row(const float* x, const float* gate, const float* dout, float* dx, float* dgate,
                             std::int64_t n);
void gelu_backward_row(const float* x, const float* dout, float* dx, std::int64_t n, GeluKind kind);

// n elements of f32, bf16 or f16, `stride` apart, from and to contiguous f32.
void load_row(DType dtype, const void* from, std::int64_t offset, std::int64_t stride, std::int64_t n,
              float* to);
void store_row(const float* from, DType dtype, void* to, std::int64_t offset, std::int64_t stride,
               std::int64_t n);

// One element.
double gated_silu_reference(double x, double gate);
double gelu_reference(double x, GeluKind kind);
struct GatedSiluGradient {
  double dx;
  double dgate;
};
GatedSiluGradient gated_silu_backward_reference(double x, double gate, double dout);
double gelu_backward_reference(double x, double dout, GeluKind kind);

// On a GPU: operands of one shape in f32, bf16 or f16 with any strides; absent outputs are not computed.
void cuda_gated_silu(Context& ctx, const Tensor& x, const Tensor& gate, const Tensor& out);
void cuda_gated_silu_backward(Context& ctx, const GatedSiluBackwardArgs& args);
void cuda_gelu(Context& ctx, const Tensor& x, const Tensor& out, GeluKind kind);
void cuda_gelu_backward(Context& ctx, const GeluBackwardArgs& args);
// In place; f32, contiguous.
void cuda_negative_exp(Context& ctx, const Tensor& a);
void cuda_negative_exp_backward(Context& ctx, const Tensor& a, const Tensor& da, const Tensor& sum);

}  // namespace krait::activation
