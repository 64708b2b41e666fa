// The backward of ssd by chunks, on the register tiles of core/simd/gemm-inl.h. A thread takes a run of
// tokens and a block of heads of one group. It walks the chunks forward for the states before each of them,
// then back with the gradient by the state; B, C, C B^T and the gradient by it are shared by the heads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/ssd/cpu/backward.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "ops/ssd/backward.h"
#include "ops/ssd/cpu/backward_chunk-inl.h"
#include "ops/ssd/cpu/backward_layout.h"

HWY_BEFORE_NAMESPACE();
namespace krait::ssd_detail::HWY_NAMESPACE {
namespace {

// The state of a head before a chunk (null: 0) and the gradient by the one after it, to be replaced by the
// gradient by the one before.
struct HeadState {
  const float* S = nullptr;
  float* dS = nullptr;
  bool flows = false;  // dS is not 0
  bool keep = false;   // the gradient by the state before is wanted
};

// `next` = the state after the chunk. `S` is null where the state before it is 0.
void advance_state(const Problem& p, const BackwardLayout& at, const Chunk& chunk, std::int64_t head,
                   const float* HWY_RESTRICT S, float* HWY_RESTRICT next, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  const float decay = load_inputs(p, at, chunk, head, w);
  if (S != nullptr) {
    const auto factor = hn::Set(df, decay);
    for (std::int64_t k = 0; k < at.state_size; k += g::kLanes)
      hn::StoreU(hn::Mul(factor, hn::LoadU(df, S + k)), df, next + k);
  }
  scale_tokens(p, at, chunk.tokens, w + at.x, w + at.left, w + at.scaled);
  multiply(by_rows(w + at.scaled, at.token_stride), w + at.B, at.state_stride, chunk.tokens, next,
           at.state_stride, p.headdim(), p.d_state(), S != nullptr);
}

void backward_head(const BackwardProblem& b, const BackwardLayout& at, const Chunk& chunk, std::int64_t head,
                   const HeadState& state, const BackwardSums& sums, std::int64_t run_index,
                   float* HWY_RESTRICT w) {
  const Problem& p = b.forward;
  const std::int64_t tokens = chunk.tokens;
  const std::int64_t sum_index = run_index * p.heads() + head;
  const float decay = load_inputs(p, at, chunk, head, w);
  load_output_gradient(b, at, chunk, head, w);

  // Through the states after and before the chunk.
  const bool carries = state.S != nullptr;
  double through = 0.0;
  for (const std::int64_t sums_of_tokens : {at.ends, at.off})
    std::fill_n(w + sums_of_tokens, at.token_stride, 0.0F);
  if (carries || state.keep) {
    decays_from_start(tokens, w + at.high, w + at.low, w + at.from_start);
    if (carries && b.dz) read_state(p, at, tokens, state.S, w);
  }
  if (state.flows) {
    gradient_through_end(b, at, tokens, state.dS, w);
    through = static_cast<double>(decay) * decay_state_gradient(p, at, state.S, decay, state.dS);
  }
  if (carries || state.keep) {
    scale_tokens(p, at, tokens, w + at.dy, w + at.from_start, w + at.scaled);
    if (carries && (b.dC || b.steps())) gradient_of_C(p, at, tokens, state.S, w);
    if (state.keep)
      multiply(by_rows(w + at.scaled, at.token_stride), w + at.C, at.state_stride, tokens, state.dS,
               at.state_stride, p.headdim(), p.d_state(), state.flows);
  }

  gradient_of_pairs(b, at, tokens, state.flows, carries, w);
  if (b.dz) store_gate_gradient(b, at, chunk, head, w);
  if (b.dx || b.steps() || b.dD) {
    float* dD = b.dD ? sums.dD.data<float>() + sum_index * p.headdim() : nullptr;
    finish_inputs(b, at, tokens, head, dD, w);
    if (b.dx) store_channels(p, chunk, w + at.dx, at.token_stride, b.dx, head);
  }
  if (b.steps())
    finish_steps(b, at, chunk, head, through, sums.dA.data<double>()[sum_index],
                 sums.ddt_bias.data<double>()[sum_index], w);
}

// What all heads of the block have added up: dC += G B, dB += G^T C.
void finish_group(const BackwardProblem& b, const BackwardLayout& at, const Chunk& chunk, std::int64_t group,
                  const BackwardSums& sums, std::int64_t part, float* HWY_RESTRICT w) {
  const Problem& p = b.forward;
  const std::int64_t tokens = chunk.tokens;
  const std::int64_t stride = at.state_stride;
  // G is 0 above its diagonal. A panel of B or C stays in the first-level cache.
  for (std::int64_t n = 0; n < p.d_state(); n += g::kTileColumns) {
    for (std::int64_t i = 0; b.dC && i < tokens; i += g::kTileRows)
      multiply(by_rows(w + at.G + i * at.token_stride, at.token_stride), w + at.B + n, stride,
               std::min<std::int64_t>(i + g::kTileRows, tokens), w + at.dC + i * stride + n, stride,
               g::kTileRows, g::kTileColumns, true);
    for (std::int64_t j = 0; b.dB && j < tokens; j += g::kTileRows)
      multiply(transposed(w + at.G + j * at.token_stride + j, at.token_stride), w + at.C + j * stride + n,
               stride, tokens - j, w + at.dB + j * stride + n, stride, g::kTileRows, g::kTileColumns, true);
  }
  if (b.dC) store_tokens(p, chunk, w + at.dC, stride, sums.dC.select(0, part), group);
  if (b.dB) store_tokens(p, chunk, w + at.dB, stride, sums.dB.select(0, part), group);
}

// `state` (P, N) = `from`, or 0 where it is absent.
void load_state(const Problem& p, const BackwardLayout& at, const Tensor& from, float* HWY_RESTRICT state) {
  std::fill_n(state, at.state_size, 0.0F);
  if (from)
    krait::HWY_NAMESPACE::load_tile(from.dtype(), from.raw(), 0, from.stride(0), from.stride(1), p.headdim(),
                                    p.d_state(), state, at.state_stride);
}

void backward_run(const BackwardProblem& b, const BackwardLayout& at, const BackwardBlock& block,
                  const BackwardSums& sums, float* HWY_RESTRICT w) {
  const Problem& p = b.forward;
  const TokenRun& run = *block.run;
  const std::int64_t group = block.head / p.heads_per_group();
  const std::int64_t chunks = (run.count + p.chunk_size - 1) / p.chunk_size;
  const auto chunk_at = [&](std::int64_t c) {
    return Chunk{&run, c * p.chunk_size, std::min(p.chunk_size, run.count - c * p.chunk_size)};
  };
  const auto of_head = [&](const Tensor& t, std::int64_t h) {
    return t.select(0, run.sequence).select(0, block.head + h);
  };
  const bool initial = run.first && p.initial_states;
  const auto state_before = [&](std::int64_t c, std::int64_t h) {
    return c > 0 || initial ? w + at.state_of(c, h) : nullptr;
  };

  for (std::int64_t h = 0; initial && h < block.heads; ++h)
    load_state(p, at, of_head(p.initial_states, h), w + at.state_of(0, h));
  for (std::int64_t c = 0; c + 1 < chunks; ++c) {
    load_tokens(p, chunk_at(c), p.B, group, w + at.B, at.state_stride);
    for (std::int64_t h = 0; h < block.heads; ++h)
      advance_state(p, at, chunk_at(c), block.head + h, state_before(c, h), w + at.state_of(c + 1, h), w);
  }

  bool flows = run.last && b.dfinal_states;
  for (std::int64_t h = 0; h < block.heads; ++h)
    load_state(p, at, flows ? of_head(b.dfinal_states, h) : Tensor(), w + at.dS_of(h));
  const bool wants_initial = run.first && b.dinitial_states;
  for (std::int64_t c = chunks - 1; c >= 0; --c) {
    const Chunk chunk = chunk_at(c);
    load_group(b, at, chunk, group, w);
    for (const std::int64_t sum : {at.dB, at.dC}) std::fill_n(w + sum, chunk.tokens * at.state_stride, 0.0F);
    std::fill_n(w + at.G, chunk.tokens * at.token_stride, 0.0F);
    const bool keep = c > 0 || wants_initial;
    for (std::int64_t h = 0; h < block.heads; ++h)
      backward_head(b, at, chunk, block.head + h,
                    {.S = state_before(c, h), .dS = w + at.dS_of(h), .flows = flows, .keep = keep}, sums,
                    block.run_index, w);
    finish_group(b, at, chunk, group, sums, block.part, w);
    flows = true;
  }
  for (std::int64_t h = 0; wants_initial && h < block.heads; ++h) {
    const Tensor to = of_head(b.dinitial_states, h);
    krait::HWY_NAMESPACE::store_tile(w + at.dS_of(h), at.state_stride, to.dtype(), to.raw(), 0, to.stride(0),
                                     to.stride(1), p.headdim(), p.d_state());
  }
}

}  // namespace
}  // namespace krait::ssd_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::ssd_detail {

HWY_EXPORT(backward_run);

namespace {

// `to` += the sums over the first dimension of `parts` (runs, size of `to`), taken in order.
template <typename T>
void add_sums(const Tensor& parts, const Tensor& to) {
  const std::int64_t size = to.numel();
  const Tensor total = to.to(DType::f64).clone();
  for (std::int64_t r = 0; r < parts.size(0); ++r)
    for (std::int64_t i = 0; i < size; ++i)
      total.data<double>()[i] += static_cast<double>(parts.data<T>()[r * size + i]);
  to.copy_from(total);
}

// The same for D by head: the sum over headdim too.
void add_sums_of_heads(const Tensor& parts, const Tensor& to) {
  const Tensor total = to.to(DType::f64).clone();
  const float* value = parts.data<float>();
  for (std::int64_t r = 0; r < parts.size(0); ++r)
    for (std::int64_t h = 0; h < parts.size(1); ++h)
      for (std::int64_t q = 0; q < parts.size(2); ++q)
        total.data<double>()[h] += static_cast<double>(*value++);
  to.copy_from(total);
}

// `to` (B, L, G, N) = the sum over the first dimension of `parts`, which are contiguous f32.
void sum_parts(Context& ctx, const Tensor& parts, const Tensor& to) {
  if (parts.size(0) == 0) {
    to.fill(0.0);
    return;
  }
  constexpr std::int64_t kTokens = 64;
  const std::int64_t tokens = to.size(1);
  const std::int64_t width = to.size(2) * to.size(3);
  const std::int64_t strips = (tokens + kTokens - 1) / kTokens;
  parallel_for(ctx, to.size(0) * strips, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = i / strips;
      const std::int64_t first = i % strips * kTokens;
      const std::int64_t count = std::min(kTokens, tokens - first);
      float* sum = parts.data<float>() + (row * tokens + first) * width;
      for (std::int64_t part = 1; part < parts.size(0); ++part)
        for (std::int64_t k = 0; k < count * width; ++k) sum[k] += sum[part * to.numel() + k];
      to.select(0, row)
          .slice(0, first, first + count)
          .copy_from(parts.select(0, 0).select(0, row).slice(0, first, first + count));
    }
  });
}

}  // namespace

void run_chunked_backward(Context& ctx, const BackwardProblem& problem) {
  BackwardProblem b = problem;
  Problem& p = b.forward;
  const std::vector<TokenRun>& runs = p.runs->runs;
  std::int64_t longest = 0;
  for (const TokenRun& run : runs) longest = std::max(longest, run.count);
  const auto run_count = static_cast<std::int64_t>(runs.size());
  const BackwardCut cut = choose_backward(run_count * p.groups(), longest, p.heads_per_group(), p.headdim(),
                                          p.d_state(), p.chunk_size);
  p.chunk_size = cut.chunk_size;
  const std::int64_t parts = (p.heads_per_group() + cut.heads - 1) / cut.heads;
  std::vector<BackwardBlock> blocks;
  for (std::int64_t r = 0; r < run_count; ++r)
    for (std::int64_t group = 0; group < p.groups(); ++group)
      for (std::int64_t part = 0; part < parts; ++part)
        blocks.push_back({.run = &runs[static_cast<std::size_t>(r)],
                          .run_index = r,
                          .head = group * p.heads_per_group() + part * cut.heads,
                          .heads = std::min(cut.heads, p.heads_per_group() - part * cut.heads),
                          .part = part});

  BackwardSums sums;
  sums.dA = Tensor::zeros({run_count, p.heads()}, DType::f64);
  sums.ddt_bias = Tensor::zeros({run_count, p.heads()}, DType::f64);
  if (b.dD) sums.dD = ctx.zeros({run_count, p.heads(), p.headdim()});
  const Dims parts_shape{parts, p.B.size(0), p.B.size(1), p.groups(), p.d_state()};
  if (b.dB) sums.dB = parts == 1 ? b.dB.unsqueeze(0) : ctx.empty(parts_shape);
  if (b.dC) sums.dC = parts == 1 ? b.dC.unsqueeze(0) : ctx.empty(parts_shape);
  for (const auto& [row, position] : p.runs->padding)
    for (const Tensor* t : {&sums.dB, &sums.dC})
      if (*t) t->select(1, row).select(1, position).fill(0.0);

  const BackwardLayout at(b, cut, longest);
  const auto count = static_cast<std::int64_t>(blocks.size());
  const std::int64_t threads = std::clamp<std::int64_t>(count, 1, ctx.threads());
  const Tensor workspace = ctx.empty({threads, at.total});
  std::atomic<std::int64_t> next{0};
  parallel_for(ctx, threads, 1, [&](std::int64_t begin, std::int64_t) {
    float* w = workspace.data<float>() + begin * at.total;
    // Parts of tiles belong to no token or channel: they are computed, so that they should be finite.
    std::fill_n(w, at.dS, 0.0F);
    for (std::int64_t i = next++; i < count; i = next++)
      HWY_DYNAMIC_DISPATCH(backward_run)(b, at, blocks[static_cast<std::size_t>(i)], sums, w);
  });

  if (parts != 1 && b.dB) sum_parts(ctx, sums.dB, b.dB);
  if (parts != 1 && b.dC) sum_parts(ctx, sums.dC, b.dC);
  if (b.dA) add_sums<double>(sums.dA, b.dA);
  if (b.ddt_bias) add_sums<double>(sums.ddt_bias, b.ddt_bias);
  if (b.dD && b.dD.ndim() == 1)
    add_sums_of_heads(sums.dD, b.dD);
  else if (b.dD)
    add_sums<float>(sums.dD, b.dD);
}

}  // namespace krait::ssd_detail
#endif
