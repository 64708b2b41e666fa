// ssd by its recurrence, with lanes over the states. A tile of four rows of a head's state and two vectors
// of N stays in registers while a block of tokens runs past it; the sums over N are kept as vectors and
// folded once a block.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/ssd/cpu/recurrent.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/parallel.h"
#include "ops/ssd/cpu/tokens-inl.h"
#include "ops/ssd/problem.h"

#ifndef KRAIT_OPS_SSD_CPU_RECURRENT_ONCE
#define KRAIT_OPS_SSD_CPU_RECURRENT_ONCE
namespace krait::ssd_detail {

inline constexpr std::int64_t kBlockTokens = 32;
inline constexpr int kStateRows = 4;
inline constexpr int kStateVectors = 2;
inline constexpr std::int64_t kMaxLanes = 16;

// Offsets, in floats, into the workspace of one thread.
struct RecurrentLayout {
  std::int64_t rows;     // P in whole tiles and vectors
  std::int64_t columns;  // N in whole tiles
  std::int64_t state, B, C, x, dx, y, spare, partial, d, exponent, total;

  RecurrentLayout(std::int64_t headdim, std::int64_t d_state) {
    const auto round_up = [](std::int64_t v, std::int64_t to) { return (v + to - 1) / to * to; };
    rows = round_up(headdim, kMaxLanes);
    columns = round_up(d_state, kStateVectors * kMaxLanes);
    std::int64_t at = 0;
    const auto place = [&at](std::int64_t floats) {
      at += floats;
      return at - floats;
    };
    state = place(rows * columns);
    B = place(kBlockTokens * columns);
    C = place(kBlockTokens * columns);
    x = place(kBlockTokens * rows);
    dx = place(kBlockTokens * rows);
    y = place(kBlockTokens * rows);
    spare = place(kBlockTokens * rows);
    partial = place(kBlockTokens * kStateRows * kMaxLanes);
    d = place(kBlockTokens + kMaxLanes);
    exponent = place(kBlockTokens + kMaxLanes);
    total = round_up(at, kMaxLanes);
  }
};

}  // namespace krait::ssd_detail
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::ssd_detail::HWY_NAMESPACE {
namespace {

// One tile of the state over a block of tokens; adds S C to `partial`, or starts it.
HWY_INLINE void advance_tile(float* HWY_RESTRICT state, std::int64_t columns, const float* HWY_RESTRICT decay,
                             const float* HWY_RESTRICT B, const float* HWY_RESTRICT C,
                             const float* HWY_RESTRICT dx, std::int64_t rows, std::int64_t tokens,
                             float* HWY_RESTRICT partial, bool start) {
  const hn::ScalableTag<float> df;
  using V = hn::Vec<decltype(df)>;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  V s[kStateRows][kStateVectors];
  for (int i = 0; i < kStateRows; ++i)
    for (int v = 0; v < kStateVectors; ++v) s[i][v] = hn::LoadU(df, state + i * columns + v * lanes);
  for (std::int64_t t = 0; t < tokens; ++t, B += columns, C += columns, dx += rows) {
    const V a = hn::Set(df, decay[t]);
    for (int i = 0; i < kStateRows; ++i) {
      const V in = hn::Set(df, dx[i]);
      float* sums = partial + (t * kStateRows + i) * lanes;
      V sum = start ? hn::Zero(df) : hn::LoadU(df, sums);
      for (int v = 0; v < kStateVectors; ++v) {
        s[i][v] = hn::MulAdd(in, hn::LoadU(df, B + v * lanes), hn::Mul(a, s[i][v]));
        sum = hn::MulAdd(s[i][v], hn::LoadU(df, C + v * lanes), sum);
      }
      hn::StoreU(sum, df, sums);
    }
  }
  for (int i = 0; i < kStateRows; ++i)
    for (int v = 0; v < kStateVectors; ++v) hn::StoreU(s[i][v], df, state + i * columns + v * lanes);
}

void advance_block(const Problem& p, const RecurrentLayout& at, const Chunk& block, std::int64_t head,
                   float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const std::int64_t group = head / p.heads_per_group();
  load_tokens(p, block, p.B, group, w + at.B, at.columns);
  load_tokens(p, block, p.C, group, w + at.C, at.columns);
  load_tokens(p, block, p.x, head, w + at.x, at.rows);
  load_steps(p, block, head, w + at.d, w + at.exponent);
  for (std::int64_t t = 0; t < block.tokens; t += lanes)
    hn::StoreU(krait::HWY_NAMESPACE::exp(df, hn::LoadU(df, w + at.exponent + t)), df, w + at.exponent + t);
  for (std::int64_t t = 0; t < block.tokens; ++t)
    for (std::int64_t q = 0; q < at.rows; ++q)
      w[at.dx + t * at.rows + q] = w[at.d + t] * w[at.x + t * at.rows + q];

  for (std::int64_t q = 0; q < p.headdim(); q += kStateRows) {
    for (std::int64_t n = 0; n < at.columns; n += kStateVectors * lanes)
      advance_tile(w + at.state + q * at.columns + n, at.columns, w + at.exponent, w + at.B + n, w + at.C + n,
                   w + at.dx + q, at.rows, block.tokens, w + at.partial, n == 0);
    for (std::int64_t t = 0; t < block.tokens; ++t) {
      for (int i = 0; i < kStateRows; ++i) {
        const auto sum = hn::LoadU(df, w + at.partial + (t * kStateRows + i) * lanes);
        w[at.y + t * at.rows + q + i] = at.columns > 0 ? hn::GetLane(hn::SumOfLanes(df, sum)) : 0.0F;
      }
    }
  }
  finish_tokens(p, block, head, w + at.y, w + at.x, w + at.spare, at.rows);
}

void recurrent_run(const Problem& p, const RecurrentLayout& at, const TokenRun& run, std::int64_t head,
                   float* HWY_RESTRICT w) {
  std::fill_n(w + at.state, at.rows * at.columns, 0.0F);
  if (run.first && p.initial_states) {
    const Tensor& from = p.initial_states;
    krait::HWY_NAMESPACE::load_tile(from.dtype(), from.raw(),
                                    run.sequence * from.stride(0) + head * from.stride(1), from.stride(2),
                                    from.stride(3), p.headdim(), p.d_state(), w + at.state, at.columns);
  }
  const auto save = [&](const Tensor& to) {
    krait::HWY_NAMESPACE::store_tile(w + at.state, at.columns, to.data<float>(), to.stride(0), to.stride(1),
                                     p.headdim(), p.d_state());
  };
  std::size_t request = run.requests_begin;
  save_states(p, run, 0, head, request, save);
  for (std::int64_t done = 0; done < run.count;) {
    const std::int64_t stop = next_stop(*p.runs, run, done, kBlockTokens, request);
    advance_block(p, at, {&run, done, stop - done}, head, w);
    done = stop;
    save_states(p, run, done, head, request, save);
  }
}

}  // namespace
}  // namespace krait::ssd_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::ssd_detail {

HWY_EXPORT(recurrent_run);

void run_recurrent(Context& ctx, const Problem& p) {
  const RecurrentLayout at(p.headdim(), p.d_state());
  const std::int64_t items = static_cast<std::int64_t>(p.runs->runs.size()) * p.heads();
  const std::int64_t parts = std::clamp<std::int64_t>(items, 1, ctx.threads());
  const Tensor workspace = ctx.empty({parts, at.total});
  std::atomic<std::int64_t> next{0};
  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t) {
    float* w = workspace.data<float>() + begin * at.total;
    // The columns beyond N and P are never written and must add nothing.
    std::fill_n(w, at.total, 0.0F);
    for (std::int64_t i = next++; i < items; i = next++) HWY_DYNAMIC_DISPATCH(recurrent_run)
    (p, at, p.runs->runs[static_cast<std::size_t>(i / p.heads())], i % p.heads(), w);
  });
}

}  // namespace krait::ssd_detail
#endif
