// embedding: rows of a table by id.
#pragma once

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

struct EmbeddingArgs {
  Tensor ids;                    // (...) i64 or i32
  Tensor weight;                 // (vocabulary, d) f32, f64, bf16 or f16
  Tensor out;                    // (..., d), optional destination
  DType out_dtype = DType::f32;  // of a new destination
};

// Returns weight[ids], (..., d). Throws where an id is outside [0, vocabulary), naming id and position.
// On a GPU ids are not read on the host: an id outside of the table gives a row of zeros there.
Tensor embedding(Context& ctx, const EmbeddingArgs& args);

struct EmbeddingBackwardArgs {
  Tensor ids;      // (...), as in the forward
  Tensor dout;     // (..., d)
  Tensor dweight;  // (vocabulary, d) f32 (f64 beside a dout of f64), added to
};

// dweight[ids] += dout, repeated ids in the order of their positions. On a GPU an id outside of the table
// adds nothing; on the CPU it is an error.
void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args);

}  // namespace krait
