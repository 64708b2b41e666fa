// Elementwise activations between the two products of an MLP.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

enum class ActivationPath : std::uint8_t { automatic, reference, simd };

struct GatedSiluArgs {
  Tensor x;     // (..., C) f32, bf16 or f16 (f64: reference), any strides
  Tensor gate;  // (..., C)
  Tensor out;   // (..., C), optional destination, may be x or gate itself
  ActivationPath path = ActivationPath::automatic;
};

// x * silu(gate), silu(g) = g / (1 + exp(-g)). Returns x's dtype.
Tensor gated_silu(Context& ctx, const GatedSiluArgs& args);

enum class GeluKind : std::uint8_t {
  exact,  // x Phi(x), Phi by erf (Hendrycks and Gimpel 2016)
  tanh,   // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
};

struct GeluArgs {
  Tensor x;    // (..., C) f32, bf16 or f16 (f64: reference), any strides
  Tensor out;  // optional destination, may be x itself
  GeluKind kind = GeluKind::exact;
  ActivationPath path = ActivationPath::automatic;
};

Tensor gelu(Context& ctx, const GeluArgs& args);

struct GatedSiluBackwardArgs {
  Tensor x;      // (..., C), as in the forward
  Tensor gate;   // (..., C)
  Tensor dout;   // (..., C)
  Tensor dx;     // (..., C), written where given; may be x, gate or dout itself
  Tensor dgate;  // (..., C), likewise
  ActivationPath path = ActivationPath::automatic;
};

void gated_silu_backward(Context& ctx, const GatedSiluBackwardArgs& args);

struct GeluBackwardArgs {
  Tensor x;     // (..., C), as in the forward
  Tensor dout;  // (..., C)
  Tensor dx;    // (..., C), written; may be x or dout itself
  GeluKind kind = GeluKind::exact;
  ActivationPath path = ActivationPath::automatic;
};

void gelu_backward(Context& ctx, const GeluBackwardArgs& args);

// A = -exp(A_log), f32 and contiguous, as Mamba parameterises its decay; A_log f32, bf16 or f16.
Tensor negative_exp(Context& ctx, const Tensor& A_log);
// dA_log += dA A; all f32, contiguous, of one shape.
void negative_exp_backward(Context& ctx, const Tensor& A, const Tensor& dA, const Tensor& dA_log);

}  // namespace krait
