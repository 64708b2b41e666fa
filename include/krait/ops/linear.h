// linear: y = x W^T + b, the projection of every block and the head of every model.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

enum class LinearPath : std::uint8_t {
  automatic,
  reference,  // plain loops, accumulation in f64
  gemv,       // few rows of x: the weights stream through once, at memory speed; CPU and GPU
  gemm,       // blocked product on Highway, weights widened while they are packed
  onednn,     // oneDNN's product; f32, and bf16 where the CPU multiplies bf16
  cublaslt,   // GPU: cuBLASLt's product, loaded when it is first needed (or KRAIT_CUBLASLT names the file)
  plain,      // GPU: one kernel for all strides and dtypes, slow
};

struct LinearArgs {
  Tensor x;       // (..., in) f32, bf16 or f16 (f64 in the reference), any strides
  Tensor weight;  // (out, in) f32, bf16 or f16, any strides
  Tensor bias;    // (out), optional
  Tensor out;     // (..., out), optional destination: x's shape but for the last size; f32, bf16 or f16
  bool accumulate = false;  // out += x W^T + b instead of out = ...
  Tensor addend;            // (..., out), optional: out = addend + x W^T + b; may be out, which accumulate is
  LinearPath path = LinearPath::automatic;
};

// Returns (..., out) in args.out, or in a new tensor of x's dtype, of the addend's where there is one. Sums
// are in f32. Products of f32 by f32 are exact to f32; a bf16 weight may be multiplied with x rounded to bf16
// where the CPU has such products and there are many rows. On a GPU, few rows are multiplied as they are; for
// many (gemv stops at 16), x is rounded to the dtype of the weight, which is where a 16-bit weight meets the
// tensor cores.
Tensor linear(Context& ctx, const LinearArgs& args);

// What oneDNN multiplies fast in this build and on this processor: bf16 by bf16 needs AVX512_BF16 or AMX.
enum class OnednnProducts : std::uint8_t { none, f32, f32_and_bf16 };
[[nodiscard]] OnednnProducts onednn_products();
// The version of oneDNN in this build ("2.6.3"), or "" where it has none.
[[nodiscard]] const char* onednn_version();

// The path that `automatic` takes for `rows` rows of x.
[[nodiscard]] LinearPath choose_linear_path(std::int64_t rows, std::int64_t in, std::int64_t out,
                                            DType weight, OnednnProducts onednn);
// The same on a GPU. cuBLASLt hands to the plain kernel what it has no kernel for, and the backend says so.
[[nodiscard]] LinearPath choose_gpu_linear_path(std::int64_t rows, std::int64_t in, std::int64_t out,
                                                DType weight);

struct LinearBackwardArgs {
  Tensor x;                    // (..., in), as in the forward; needed for dweight
  Tensor weight;               // (out, in); needed for dx
  Tensor dout;                 // (..., out)
  Tensor dx;                   // (..., in), written where given: dout W
  bool accumulate_dx = false;  // dx += instead
  Tensor dweight;              // (out, in) f32, added to where given: dout^T x
  Tensor dbias;                // (out) f32, added to where given
  LinearPath path = LinearPath::automatic;
};

// Sums are in f32. Where the weight is bf16 and the CPU multiplies bf16, x and dout are rounded to bf16 for
// the products; dweight and dx are not. On a GPU both are rounded to the dtype of the weight (without a
// weight, of dout), for any number of rows.
void linear_backward(Context& ctx, const LinearBackwardArgs& args);

}  // namespace krait
