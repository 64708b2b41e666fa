// ssd by chunks, on the register tiles of core/simd/gemm-inl.h. A thread takes a run of tokens and a block
// of heads of one group, and walks the run chunk by chunk; C B^T is computed once a chunk and shared by the
// heads. Operands are laid out as the tiles read them, so that nothing is packed twice:
//   C and M by rows, B by rows (read as B^T), d x and the states in panels of tile columns over P.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/ssd/cpu/chunked.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "core/simd/gemm-inl.h"
#include "ops/ssd/cpu/tokens-inl.h"
#include "ops/ssd/problem.h"

#ifndef KRAIT_OPS_SSD_CPU_CHUNKED_ONCE
#define KRAIT_OPS_SSD_CPU_CHUNKED_ONCE
namespace krait::ssd_detail {

// Offsets, in floats, into the workspace of one thread, and the row lengths of its matrices. Sizes fit the
// tiles of every SIMD target.
struct ChunkLayout {
  std::int64_t b_columns;  // of B: N, and a tile's rows beyond it
  std::int64_t c_columns;  // of C
  std::int64_t steps;      // of M and CB
  std::int64_t width;      // of x, y: P in whole panels
  std::int64_t state_size;
  std::int64_t B, C, packed_b, CB, M, x, y, spare, dx, d, exponent, high, low, states, total;

  ChunkLayout(std::int64_t chunk, std::int64_t headdim, std::int64_t d_state, std::int64_t heads) {
    namespace g = gemm_limits;
    const auto round_up = [](std::int64_t v, std::int64_t to) { return (v + to - 1) / to * to; };
    const std::int64_t rows = round_up(chunk + g::kMaxTileRows, 16);
    b_columns = round_up(d_state + g::kMaxTileRows, 16);
    c_columns = round_up(d_state, 16);
    steps = round_up(chunk, g::kMaxTileColumns);
    width = round_up(headdim, g::kMaxTileColumns);
    state_size = d_state * width;
    std::int64_t at = 0;
    const auto place = [&](std::int64_t floats) {
      at += round_up(floats, 16);
      return at - round_up(floats, 16);
    };
    B = place(rows * b_columns);
    C = place(rows * c_columns);
    packed_b = place(d_state * steps);
    CB = place(rows * steps);
    M = place(rows * steps);
    x = place(rows * width);
    y = place(rows * width);
    spare = place(rows * width);
    dx = place(chunk * width);
    d = place(steps);
    exponent = place(steps);
    high = place(steps);
    low = place(steps);
    states = place(heads * state_size);
    total = at;
  }
};

// A run and heads [head, head + heads) of one group.
struct HeadBlock {
  const TokenRun* run = nullptr;
  std::int64_t head = 0;
  std::int64_t heads = 0;
};

}  // namespace krait::ssd_detail
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::ssd_detail::HWY_NAMESPACE {
namespace {

namespace g = krait::HWY_NAMESPACE::gemm_detail;

// CB (lower triangle, by tiles) = C B^T of the chunk.
void load_group(const Problem& p, const ChunkLayout& at, const Chunk& chunk, std::int64_t group,
                float* HWY_RESTRICT w) {
  const std::int64_t d_state = p.d_state();
  load_tokens(p, chunk, p.B, group, w + at.B, at.b_columns);
  load_tokens(p, chunk, p.C, group, w + at.C, at.c_columns);
  g::pack_b(Strided<const float>{w + at.B, 1, at.b_columns}, chunk.tokens, d_state, w + at.packed_b);
  for (std::int64_t i = 0; i < chunk.tokens; i += g::kTileRows) {
    const std::int64_t rows = std::min<std::int64_t>(g::kTileRows, chunk.tokens - i);
    for (std::int64_t j = 0; j < i + rows; j += g::kTileColumns)
      g::multiply_tile(w + at.C + i * at.c_columns, {at.c_columns, 1}, w + at.packed_b + j * d_state, d_state,
                       Strided<float>{w + at.CB + i * at.steps + j, at.steps, 1}, rows, g::kTileColumns,
                       false);
  }
}

// M_ij = CB_ij exp(a_i - a_j) for j <= i; what lies right of the diagonal is not read.
void decay_products(const ChunkLayout& at, std::int64_t tokens, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  for (std::int64_t i = 0; i < tokens; ++i) {
    const float* cb = w + at.CB + i * at.steps;
    float* m = w + at.M + i * at.steps;
    const auto high = hn::Set(df, w[at.high + i]);
    const auto low = hn::Set(df, w[at.low + i]);
    for (std::int64_t j = 0; j <= i; j += g::kLanes) {
      const auto decay = decay_between(high, low, w + at.high + j, w + at.low + j);
      hn::StoreU(hn::Mul(hn::LoadU(df, cb + j), decay), df, m + j);
    }
  }
}

// y += M (d x) on the diagonal: row r of the tile takes its first r + 1 columns and nothing else, so that
// not even a NaN passes from a token to an earlier one.
HWY_INLINE void add_triangle(const float* HWY_RESTRICT m, std::int64_t m_stride, const float* HWY_RESTRICT dx,
                             std::int64_t rows, float* HWY_RESTRICT y, std::int64_t y_stride) {
  const hn::ScalableTag<float> df;
  for (int v = 0; v < g::kTileVectors; ++v, dx += g::kLanes, y += g::kLanes) {
    const auto add_row = [&](std::int64_t r) HWY_ATTR {
      auto sum = hn::LoadU(df, y + r * y_stride);
      for (std::int64_t j = 0; j <= r; ++j)
        sum = hn::MulAdd(hn::Set(df, m[r * m_stride + j]), hn::LoadU(df, dx + j * g::kTileColumns), sum);
      hn::StoreU(sum, df, y + r * y_stride);
    };
    if (rows == g::kTileRows) {  // nearly always: the compiler unrolls it
      for (int r = 0; r < g::kTileRows; ++r) add_row(r);
    } else {
      for (std::int64_t r = 0; r < rows; ++r) add_row(r);
    }
  }
}

// dx (panels) = d x.
void pack_inputs(const ChunkLayout& at, std::int64_t tokens, std::int64_t panels, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  for (std::int64_t q = 0; q < panels; ++q) {
    const float* from = w + at.x + q * g::kTileColumns;
    float* to = w + at.dx + q * tokens * g::kTileColumns;
    for (std::int64_t t = 0; t < tokens; ++t, from += at.width, to += g::kTileColumns) {
      const auto d = hn::Set(df, w[at.d + t]);
      for (int v = 0; v < g::kTileVectors; ++v)
        hn::StoreU(hn::Mul(d, hn::LoadU(df, from + v * g::kLanes)), df, to + v * g::kLanes);
    }
  }
}

HWY_INLINE void scale_row(float* HWY_RESTRICT row, std::int64_t count, float by) {
  const hn::ScalableTag<float> df;
  const auto factor = hn::Set(df, by);
  for (std::int64_t i = 0; i < count; i += g::kLanes)
    hn::StoreU(hn::Mul(factor, hn::LoadU(df, row + i)), df, row + i);
}

// One head over one chunk; `carry`: its state is not zero. The new state is computed where `keep`.
void advance_chunk(const Problem& p, const ChunkLayout& at, const Chunk& chunk, std::int64_t head,
                   float* HWY_RESTRICT state, bool carry, bool keep, float* HWY_RESTRICT w) {
  const std::int64_t tokens = chunk.tokens;
  const std::int64_t d_state = p.d_state();
  const std::int64_t panels = (p.headdim() + g::kTileColumns - 1) / g::kTileColumns;
  float* d = w + at.d;
  load_steps(p, chunk, head, d, w + at.exponent);
  sum_exponents(tokens, w + at.exponent, w + at.high, w + at.low);
  decay_products(at, tokens, w);
  load_tokens(p, chunk, p.x, head, w + at.x, at.width);
  pack_inputs(at, tokens, panels, w);

  // y = exp(a_i) S C_i + M (d x). Panels come outermost: a panel of S or d x stays in the first-level cache.
  float* y = w + at.y;
  const auto tile_of_y = [&](std::int64_t i, std::int64_t q) {
    return Strided<float>{y + i * at.width + q * g::kTileColumns, at.width, 1};
  };
  if (carry) {
    for (std::int64_t q = 0; q < panels; ++q)
      for (std::int64_t i = 0; i < tokens; i += g::kTileRows)
        g::multiply_tile(w + at.C + i * at.c_columns, {at.c_columns, 1},
                         state + q * d_state * g::kTileColumns, d_state, tile_of_y(i, q),
                         std::min<std::int64_t>(g::kTileRows, tokens - i), g::kTileColumns, false);
    decays_from_start(tokens, w + at.high, w + at.low, w + at.exponent);
    for (std::int64_t i = 0; i < tokens; ++i)
      scale_row(y + i * at.width, panels * g::kTileColumns, w[at.exponent + i]);
  }
  for (std::int64_t q = 0; q < panels; ++q) {
    const float* dx = w + at.dx + q * tokens * g::kTileColumns;
    for (std::int64_t i = 0; i < tokens; i += g::kTileRows) {
      const std::int64_t rows = std::min<std::int64_t>(g::kTileRows, tokens - i);
      const float* m = w + at.M + i * at.steps;
      const Strided<float> to = tile_of_y(i, q);
      g::multiply_tile(m, {at.steps, 1}, dx, i, to, rows, g::kTileColumns, carry);
      add_triangle(m + i, at.steps, dx + i * g::kTileColumns, rows, to.data, to.row_stride);
    }
  }
  finish_tokens(p, chunk, head, y, w + at.x, w + at.spare, at.width);
  if (!keep) return;

  // S = exp(a_last) S + sum_j exp(a_last - a_j) d_j x_j B_j^T.
  const float decay = decays_to_end(tokens, w + at.high, w + at.low, w + at.exponent);
  for (std::int64_t q = 0; q < panels; ++q) {
    float* dx = w + at.dx + q * tokens * g::kTileColumns;
    for (std::int64_t j = 0; j < tokens; ++j)
      scale_row(dx + j * g::kTileColumns, g::kTileColumns, w[at.exponent + j]);
  }
  if (carry) scale_row(state, panels * d_state * g::kTileColumns, decay);
  // Rows of N come outermost: B is read in strips of a tile's rows, each once.
  for (std::int64_t n = 0; n < d_state; n += g::kTileRows)
    for (std::int64_t q = 0; q < panels; ++q)
      g::multiply_tile(w + at.B + n, {1, at.b_columns}, w + at.dx + q * tokens * g::kTileColumns, tokens,
                       Strided<float>{state + (q * d_state + n) * g::kTileColumns, g::kTileColumns, 1},
                       std::min<std::int64_t>(g::kTileRows, d_state - n), g::kTileColumns, carry);
}

void load_state(const Problem& p, const Tensor& from, float* HWY_RESTRICT state) {
  const std::int64_t d_state = p.d_state();
  for (std::int64_t q = 0; q < p.headdim(); q += g::kTileColumns, state += d_state * g::kTileColumns) {
    const std::int64_t columns = std::min<std::int64_t>(g::kTileColumns, p.headdim() - q);
    if (columns < g::kTileColumns) std::fill_n(state, d_state * g::kTileColumns, 0.0F);
    krait::HWY_NAMESPACE::load_tile(from.dtype(), from.raw(), q * from.stride(0), from.stride(1),
                                    from.stride(0), d_state, columns, state, g::kTileColumns);
  }
}

void store_state(const Problem& p, const float* HWY_RESTRICT state, const Tensor& to) {
  const std::int64_t d_state = p.d_state();
  for (std::int64_t q = 0; q < p.headdim(); q += g::kTileColumns, state += d_state * g::kTileColumns)
    krait::HWY_NAMESPACE::store_tile(state, g::kTileColumns, to.data<float>() + q * to.stride(0),
                                     to.stride(1), to.stride(0), d_state,
                                     std::min<std::int64_t>(g::kTileColumns, p.headdim() - q));
}

void chunked_run(const Problem& p, const ChunkLayout& at, const HeadBlock& block, float* HWY_RESTRICT w) {
  const TokenRun& run = *block.run;
  const auto state_of = [&](std::int64_t h) { return w + at.states + (h - block.head) * at.state_size; };
  bool carry = run.first && p.initial_states;
  std::size_t request = run.requests_begin;
  std::size_t next_request = request;
  // Saves what is wanted of one head after `done` tokens.
  const auto save = [&](std::int64_t h, std::int64_t done) {
    next_request = request;
    save_states(p, run, done, h, next_request, [&](const Tensor& to) {
      if (!carry) std::fill_n(state_of(h), at.state_size, 0.0F);
      store_state(p, state_of(h), to);
    });
  };

  for (std::int64_t h = block.head; h < block.head + block.heads; ++h) {
    if (carry) load_state(p, p.initial_states.select(0, run.sequence).select(0, h), state_of(h));
    save(h, 0);
  }
  request = next_request;
  for (std::int64_t done = 0; done < run.count;) {
    const std::int64_t stop = next_stop(*p.runs, run, done, p.chunk_size, request);
    const bool wanted = request < run.requests_end && p.runs->requests[request].count == stop;
    const bool keep = stop < run.count || wanted || (run.last && p.final_states);
    const Chunk chunk{&run, done, stop - done};
    load_group(p, at, chunk, block.head / p.heads_per_group(), w);
    for (std::int64_t h = block.head; h < block.head + block.heads; ++h)
      advance_chunk(p, at, chunk, h, state_of(h), carry, keep, w);
    carry = true;
    for (std::int64_t h = block.head; h < block.head + block.heads; ++h) save(h, stop);
    request = next_request;
    done = stop;
  }
}

}  // namespace
}  // namespace krait::ssd_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::ssd_detail {

HWY_EXPORT(chunked_run);

void run_chunked(Context& ctx, const Problem& p) {
  const auto independent = static_cast<std::int64_t>(p.runs->runs.size()) * p.groups();
  const std::int64_t heads =
      choose_heads_per_block(independent, p.heads_per_group(), p.headdim() * p.d_state(), ctx.threads());
  std::vector<HeadBlock> blocks;
  for (const TokenRun& run : p.runs->runs)
    for (std::int64_t group = 0; group < p.groups(); ++group)
      for (std::int64_t h = 0; h < p.heads_per_group(); h += heads)
        blocks.push_back({&run, group * p.heads_per_group() + h, std::min(heads, p.heads_per_group() - h)});

  const auto count = static_cast<std::int64_t>(blocks.size());
  const std::int64_t parts = std::clamp<std::int64_t>(count, 1, ctx.threads());
  const ChunkLayout at(p.chunk_size, p.headdim(), p.d_state(), heads);
  const Tensor workspace = ctx.empty({parts, at.total});
  std::atomic<std::int64_t> next{0};
  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t) {
    float* w = workspace.data<float>() + begin * at.total;
    // Parts of tiles belong to no token or channel: they are computed, so that they should be finite.
    std::fill_n(w, at.states, 0.0F);
    for (std::int64_t i = next++; i < count; i = next++)
      HWY_DYNAMIC_DISPATCH(chunked_run)(p, at, blocks[static_cast<std::size_t>(i)], w);
  });
}

}  // namespace krait::ssd_detail
#endif
