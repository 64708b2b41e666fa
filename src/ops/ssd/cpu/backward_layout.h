// The workspace of the chunked backward, and what its threads share. Independent of the SIMD target.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/simd/gemm.h"
#include "ops/ssd/backward.h"

namespace krait::ssd_detail {

// Tokens i of the pairs (i, j) that are worked on together. A multiple of the tile columns of every target.
inline constexpr std::int64_t kPairRows = 96;
// Tokens whose part of dC through the state is worked on together, in the first-level cache.
inline constexpr std::int64_t kStateRows = 24;

// Offsets, in floats, into the workspace of one thread. All matrices are stored by rows, whose length is one
// of two strides: a token's d_state values, or a channel's values over the tokens of a chunk. Rows and
// columns leave room for whole tiles of every SIMD target, and the strides are odd numbers of cache lines:
// the rows of a tile then fall into different sets of the cache.
struct BackwardLayout {
  std::int64_t state_stride;  // of a row of N values
  std::int64_t token_stride;  // of a row of the chunk's tokens
  std::int64_t pair_stride;   // of a row of M^T
  std::int64_t state_size;
  std::int64_t heads;
  std::int64_t B, C;             // (tokens, N)
  std::int64_t Bt, Ct;           // (N, tokens); Ct only with dz
  std::int64_t CB, G;            // (tokens, tokens): C B^T, and the gradient by it
  std::int64_t M, dM, Mt;        // of one head: kPairRows rows of the masked matrix; M^T only with dz
  std::int64_t dB, dC, dC_head;  // (tokens, N)
  std::int64_t x, dy;            // (P, tokens): x^T and the gradient by y
  std::int64_t dx;               // (P, tokens): the gradient by d x
  std::int64_t scaled;           // (P, tokens): x or dy times factors of the tokens
  std::int64_t gate, y;          // (P, tokens): only with z, only with dz
  // One value for each token.
  std::int64_t raw, d, exponent, high, low, from_start, to_end, left, column_sums, off, ends, dd;
  std::int64_t dS;      // of each head of the block
  std::int64_t states;  // of each head, before each chunk
  std::int64_t total;

  BackwardLayout(const BackwardProblem& b, const BackwardCut& cut, std::int64_t longest) {
    namespace g = gemm_limits;
    const Problem& p = b.forward;
    const auto round_up = [](std::int64_t v, std::int64_t to) { return (v + to - 1) / to * to; };
    const auto stride_of = [&](std::int64_t columns) {
      const std::int64_t stride =
          std::max(round_up(columns, g::kMaxTileColumns), round_up(columns + g::kMaxTileRows, 16));
      return stride / 16 % 2 == 0 ? stride + 16 : stride;
    };
    state_stride = stride_of(p.d_state());
    token_stride = stride_of(cut.chunk_size);
    const std::int64_t pair_rows = std::min(cut.chunk_size, kPairRows);
    pair_stride = stride_of(pair_rows);
    const std::int64_t tokens = cut.chunk_size + g::kMaxTileRows;
    const std::int64_t channels = p.headdim() + g::kMaxTileRows;
    state_size = channels * state_stride;
    heads = cut.heads;
    const std::int64_t chunks = (longest + cut.chunk_size - 1) / cut.chunk_size;

    std::int64_t at = 0;
    const auto place = [&](std::int64_t rows, std::int64_t stride) {
      at += rows * stride;
      return at - rows * stride;
    };
    const std::int64_t with_z = p.z ? 1 : 0;
    const std::int64_t with_dz = b.dz ? 1 : 0;
    for (std::int64_t* m : {&B, &C, &dB, &dC}) *m = place(tokens, state_stride);
    dC_head = place(kStateRows + g::kMaxTileRows, state_stride);
    Bt = place(p.d_state(), token_stride);
    Ct = place(p.d_state() * with_dz, token_stride);
    for (std::int64_t* m : {&CB, &G}) *m = place(tokens, token_stride);
    for (std::int64_t* m : {&M, &dM}) *m = place(pair_rows + g::kMaxTileRows, token_stride);
    Mt = place(tokens * with_dz, pair_stride);
    for (std::int64_t* m : {&x, &dy, &dx, &scaled}) *m = place(channels, token_stride);
    gate = place(channels * with_z, token_stride);
    y = place(channels * with_dz, token_stride);
    for (std::int64_t* v :
         {&raw, &d, &exponent, &high, &low, &from_start, &to_end, &left, &column_sums, &off, &ends, &dd})
      *v = place(1, token_stride);
    dS = place(heads, state_size);
    states = place(heads * std::max<std::int64_t>(chunks, 1), state_size);
    total = at;
  }

  [[nodiscard]] std::int64_t dS_of(std::int64_t head) const { return dS + head * state_size; }
  // Before chunk `chunk`, head counted from the block's first.
  [[nodiscard]] std::int64_t state_of(std::int64_t chunk, std::int64_t head) const {
    return states + (chunk * heads + head) * state_size;
  }
};

// A run and heads [head, head + heads) of one group. dB and dC of the block go to the sums `part`.
struct BackwardBlock {
  const TokenRun* run = nullptr;
  std::int64_t run_index = 0;
  std::int64_t head = 0;
  std::int64_t heads = 0;
  std::int64_t part = 0;
};

// What blocks write that others write too, kept apart until all are done.
struct BackwardSums {
  Tensor dA;        // (runs, H) f64
  Tensor ddt_bias;  // (runs, H) f64
  Tensor dD;        // (runs, H, P) f32, absent where not wanted
  Tensor dB;        // (parts, B, L, G, N); dB itself where there is one part; absent where not wanted
  Tensor dC;
};

}  // namespace krait::ssd_detail
