// The backward of causal_conv1d on Highway: lanes over channels, one walk over the tokens of a run, in tiles
// of f32 that stay in the first-level cache.
//
// A run is a line of K - 1 inputs before it and its own tokens. With g the gradient of what the activation
// saw, the gradient of line place j is sum_k weight_k g_{j-k}: a convolution of g with the taps in reverse.
// It is known as soon as token j has been reached, so that dx follows K - 1 tokens behind dout and may
// replace it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/causal_conv1d/cpu/backward.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/simd/tile-inl.h"
#include "ops/causal_conv1d/conv.h"
#include "ops/causal_conv1d/cpu/rows-inl.h"

#ifndef KRAIT_OPS_CAUSAL_CONV1D_CPU_BACKWARD_ONCE
#define KRAIT_OPS_CAUSAL_CONV1D_CPU_BACKWARD_ONCE
namespace krait::conv_detail {

// Three tiles fill the first-level cache; rows of whole cache lines suit the processor's prefetcher.
inline constexpr std::int64_t kGradientTokens = 16;
inline constexpr std::int64_t kGradientChannels = 128;

// Work of one thread at a time: a range of runs, channels [channel, channel + channels).
struct Strip {
  const TokenRun* begin = nullptr;
  const TokenRun* end = nullptr;
  std::int64_t channel = 0;
  std::int64_t channels = 0;
  float* sums = nullptr;  // K + 1 rows, `sum_stride` apart: of dweight and of dbias over these runs
};

// What all strips read beside the operands.
struct Shared {
  Taps taps;
  Tensor dfinal_states;  // (sequences, K-1, D) f32 or absent
  std::int64_t sum_stride = 0;
};

}  // namespace krait::conv_detail
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::conv_detail::HWY_NAMESPACE {
namespace {

using krait::HWY_NAMESPACE::load_tile;
using krait::HWY_NAMESPACE::store_tile;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

struct Tiles {
  float* x;         // K - 1 rows of history, then kGradientTokens rows
  float* gradient;  // likewise, of what the activation saw
  float* result;    // kGradientTokens rows
};

// Calls body(row, rows, position): tokens [begin, end) of the run lie in rows from `row` on and at
// consecutive positions.
template <typename Body>
void for_spans(const TokenRuns& runs, const TokenRun& run, std::int64_t begin, std::int64_t end,
               const Body& body) {
  if (begin >= end) return;
  if (run.listed < 0) return body(std::int64_t{0}, end - begin, runs.position(run, begin));
  for (std::int64_t i = begin; i < end; ++i) body(i - begin, std::int64_t{1}, runs.position(run, i));
}

void load_tokens(const Tensor& t, const TokenRuns& runs, const TokenRun& run, std::int64_t begin,
                 std::int64_t end, const Strip& strip, float* to) {
  for_spans(runs, run, begin, end, [&](std::int64_t row, std::int64_t rows, std::int64_t position) {
    load_tile(t.dtype(), t.raw(),
              run.row * t.stride(0) + strip.channel * t.stride(1) + position * t.stride(2), t.stride(2),
              t.stride(1), rows, strip.channels, to + row * kGradientChannels, kGradientChannels);
  });
}

void store_tokens(const float* from, const Tensor& t, const TokenRuns& runs, const TokenRun& run,
                  std::int64_t begin, std::int64_t end, const Strip& strip) {
  for_spans(runs, run, begin, end, [&](std::int64_t row, std::int64_t rows, std::int64_t position) {
    store_tile(from + row * kGradientChannels, kGradientChannels, t.dtype(), t.raw(),
               run.row * t.stride(0) + strip.channel * t.stride(1) + position * t.stride(2), t.stride(2),
               t.stride(1), rows, strip.channels);
  });
}

// What the rows of a tile are turned into.
struct RowsBackward {
  const float* x;  // K - 1 rows before the first one, then `rows`
  float* gradient;
  std::int64_t rows;
  std::int64_t columns;  // whole vectors
  bool silu;             // gradient *= silu'(bias + sum_k weight_k x_k) first
  float* sums;           // null, or K + 1 rows: sums_k += gradient x_k over the rows, sums_K += gradient
  std::int64_t sum_stride;
};

// A vector of channels at a time, the sums in registers.
template <int kKernel>
void rows_backward(const RowsBackward& r, const TapRows& taps) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t c = 0; c < r.columns; c += lanes) {
    V sums[kKernel + 1];
    for (int k = 0; k <= kKernel; ++k) sums[k] = hn::Zero(d);
    const float* x = r.x + c;
    float* to = r.gradient + c;
    for (std::int64_t t = 0; t < r.rows; ++t, x += kGradientChannels, to += kGradientChannels) {
      V input[kKernel];
      for (int k = 0; k < kKernel; ++k) input[k] = hn::Load(d, x + k * kGradientChannels);
      V gradient = hn::Load(d, to);
      if (r.silu) {
        V sum = hn::LoadU(d, taps.bias + c);
        for (int k = 0; k < kKernel; ++k)
          sum = hn::MulAdd(hn::LoadU(d, taps.weight + k * taps.stride + c), input[k], sum);
        V derivative = sum;
        krait::HWY_NAMESPACE::silu_with_derivative(d, sum, sum, derivative);
        gradient = hn::Mul(gradient, derivative);
        hn::Store(gradient, d, to);
      }
      for (int k = 0; k < kKernel; ++k) sums[k] = hn::MulAdd(gradient, input[k], sums[k]);
      sums[kKernel] = hn::Add(sums[kKernel], gradient);
    }
    if (r.sums == nullptr) continue;
    for (int k = 0; k <= kKernel; ++k) {
      float* total = r.sums + k * r.sum_stride + c;
      hn::Store(hn::Add(hn::Load(d, total), sums[k]), d, total);
    }
  }
}

// The same for any K: a tap at a time, which gives each sum in the same order.
void rows_backward_any(const RowsBackward& r, const TapRows& taps) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t c = 0; c < r.columns; c += lanes) {
    for (std::int64_t t = 0; r.silu && t < r.rows; ++t) {
      V sum = hn::LoadU(d, taps.bias + c);
      for (std::int64_t k = 0; k < taps.kernel; ++k)
        sum = hn::MulAdd(hn::LoadU(d, taps.weight + k * taps.stride + c),
                         hn::Load(d, r.x + (t + k) * kGradientChannels + c), sum);
      V derivative = sum;
      krait::HWY_NAMESPACE::silu_with_derivative(d, sum, sum, derivative);
      float* to = r.gradient + t * kGradientChannels + c;
      hn::Store(hn::Mul(hn::Load(d, to), derivative), d, to);
    }
    for (std::int64_t k = 0; r.sums != nullptr && k <= taps.kernel; ++k) {
      V sum = hn::Zero(d);
      for (std::int64_t t = 0; t < r.rows; ++t) {
        const V gradient = hn::Load(d, r.gradient + t * kGradientChannels + c);
        sum = k == taps.kernel
                  ? hn::Add(sum, gradient)
                  : hn::MulAdd(gradient, hn::Load(d, r.x + (t + k) * kGradientChannels + c), sum);
      }
      float* total = r.sums + k * r.sum_stride + c;
      hn::Store(hn::Add(hn::Load(d, total), sum), d, total);
    }
  }
}

void rows_backward(const RowsBackward& r, const TapRows& taps) {
  switch (taps.kernel) {
    case 2: return rows_backward<2>(r, taps);
    case 3: return rows_backward<3>(r, taps);
    case 4: return rows_backward<4>(r, taps);
    default: return rows_backward_any(r, taps);
  }
}

// Asks for the tokens of the next tile while this one is computed. Those of a run with padding inside, which
// lie apart, are left alone.
void prefetch_tokens(const Tensor& t, const TokenRun& run, std::int64_t begin, std::int64_t end,
                     const Strip& strip) {
  if (begin >= end || run.listed >= 0) return;
  krait::HWY_NAMESPACE::prefetch_tile(
      t.raw(),
      run.row * t.stride(0) + strip.channel * t.stride(1) + (run.start + begin * run.step) * t.stride(2),
      t.stride(2), t.stride(1), end - begin, strip.channels, static_cast<std::int64_t>(size_of(t.dtype())));
}

// The K - 1 inputs before the run; nothing is known of a gradient before it.
void start_run(const Backward& b, const TokenRun& run, const Strip& strip, std::int64_t width,
               const Tiles& tiles) {
  std::fill_n(tiles.gradient, width * kGradientChannels, 0.0F);
  const Tensor& from = b.initial_states;
  if (run.first && from)
    load_tile(from.dtype(), from.raw(), run.sequence * from.stride(0) + strip.channel * from.stride(1),
              from.stride(2), from.stride(1), width, strip.channels, tiles.x, kGradientChannels);
  else
    std::fill_n(tiles.x, width * kGradientChannels, 0.0F);
}

// Places [begin, end) of the line's gradient, in rows of `tile`: the final state's gradient is added, then
// they go to the initial state and to dx.
void finish_places(const Backward& b, const Shared& shared, const TokenRun& run, const Strip& strip,
                   std::int64_t width, std::int64_t begin, std::int64_t end, float* tile) {
  const Tensor& final = shared.dfinal_states;
  if (run.last && final) {
    for (std::int64_t j = std::max(begin, run.count); j < end; ++j) {
      const float* from = final.data<float>() + run.sequence * final.stride(0) +
                          (j - run.count) * final.stride(1) + strip.channel;
      float* to = tile + (j - begin) * kGradientChannels;
      for (std::int64_t c = 0; c < strip.channels; ++c) to[c] += from[c];
    }
  }
  const Tensor& initial = b.dinitial_states;
  if (run.first && initial && begin < width)
    store_tile(
        tile, kGradientChannels, initial.dtype(), initial.raw(),
        run.sequence * initial.stride(0) + strip.channel * initial.stride(1) + begin * initial.stride(2),
        initial.stride(2), initial.stride(1), std::min(width, end) - begin, strip.channels);
  if (b.dx) {
    const std::int64_t first = std::max(begin, width);
    store_tokens(tile + (first - begin) * kGradientChannels, b.dx, *b.runs, run, first - width, end - width,
                 strip);
  }
}

void run_backward(const Backward& b, const Shared& shared, const TokenRun& run, const Strip& strip,
                  const Tiles& tiles, const float* zeros) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(D()));
  const std::int64_t columns = (strip.channels + lanes - 1) / lanes * lanes;
  const Tensor& weight = shared.taps.weight;
  const std::int64_t kernel = weight.size(0);
  const std::int64_t width = kernel - 1;
  const float* first_tap = weight.data<float>() + strip.channel;
  const TapRows taps{first_tap, weight.stride(0), shared.taps.bias.data<float>() + strip.channel, kernel,
                     Activation::none};
  const TapRows reversed{first_tap + width * weight.stride(0), -weight.stride(0), zeros, kernel,
                         Activation::none};
  const bool silu = b.activation == Activation::silu;
  const bool use_x = silu || b.dweight;
  const bool places = b.dx || b.dinitial_states;
  float* new_x = tiles.x + width * kGradientChannels;
  float* new_gradient = tiles.gradient + width * kGradientChannels;

  start_run(b, run, strip, width, tiles);
  const std::int64_t line = run.count + width;
  for (std::int64_t begin = 0; begin < line; begin += kGradientTokens) {
    const std::int64_t end = std::min(begin + kGradientTokens, line);
    const std::int64_t tokens_end = std::clamp(run.count, begin, end);
    const std::int64_t tokens = tokens_end - begin;
    load_tokens(b.dout, *b.runs, run, begin, tokens_end, strip, new_gradient);
    std::fill_n(new_gradient + tokens * kGradientChannels, (end - tokens_end) * kGradientChannels, 0.0F);
    if (use_x) load_tokens(b.x, *b.runs, run, begin, tokens_end, strip, new_x);
    const std::int64_t next_end = std::min(tokens_end + kGradientTokens, run.count);
    prefetch_tokens(b.dout, run, tokens_end, next_end, strip);
    if (use_x) prefetch_tokens(b.x, run, tokens_end, next_end, strip);
    if (silu || strip.sums != nullptr)
      rows_backward({.x = tiles.x,
                     .gradient = new_gradient,
                     .rows = tokens,
                     .columns = columns,
                     .silu = silu,
                     .sums = strip.sums,
                     .sum_stride = shared.sum_stride},
                    taps);
    if (places) {
      convolve(tiles.gradient, kGradientChannels, reversed, tiles.result, kGradientChannels, end - begin,
               columns);
      finish_places(b, shared, run, strip, width, begin, end, tiles.result);
    }
    const auto history = static_cast<std::size_t>(width * kGradientChannels) * sizeof(float);
    std::memmove(tiles.x, tiles.x + kGradientTokens * kGradientChannels, history);
    std::memmove(tiles.gradient, tiles.gradient + kGradientTokens * kGradientChannels, history);
  }
}

// `workspace` holds the tiles and a row of zeros.
void strips_backward(const Backward& b, const Shared& shared, const Strip* strips, std::int64_t count,
                     float* workspace) {
  const std::int64_t rows = kGradientTokens + shared.taps.weight.size(0) - 1;
  const Tiles tiles{workspace, workspace + rows * kGradientChannels,
                    workspace + 2 * rows * kGradientChannels};
  float* zeros = tiles.result + kGradientTokens * kGradientChannels;
  std::fill_n(workspace, zeros + kGradientChannels - workspace, 0.0F);
  for (std::int64_t i = 0; i < count; ++i) {
    const Strip& strip = strips[i];
    if (strip.sums != nullptr)
      for (std::int64_t k = 0; k <= shared.taps.weight.size(0); ++k)
        std::fill_n(strip.sums + k * shared.sum_stride, kGradientChannels, 0.0F);
    for (const TokenRun* run = strip.begin; run != strip.end; ++run)
      run_backward(b, shared, *run, strip, tiles, zeros);
  }
}

}  // namespace
}  // namespace krait::conv_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::conv_detail {
namespace {

HWY_EXPORT(strips_backward);

// The first run of each group: groups of at least kGroupTokens tokens, whose sums over tokens are one row of
// partial sums. They depend on the sequences alone.
std::vector<std::size_t> group_runs(const std::vector<TokenRun>& runs) {
  constexpr std::int64_t kGroupTokens = 512;
  std::vector<std::size_t> first;
  std::int64_t tokens = kGroupTokens;
  for (std::size_t r = 0; r < runs.size(); ++r) {
    if (tokens >= kGroupTokens) {
      first.push_back(r);
      tokens = 0;
    }
    tokens += runs[r].count;
  }
  return first;
}

// dweight and dbias of channels [begin, end) += the partial sums (groups, K + 1, channels) in their order.
void add_partial_sums(const Tensor& partial, const Backward& b, std::int64_t begin, std::int64_t end) {
  const std::int64_t kernel = b.weight.size(1);
  for (std::int64_t k = 0; k <= kernel; ++k) {
    const Tensor to = k < kernel ? (b.dweight ? b.dweight.select(1, k) : Tensor()) : b.dbias;
    if (!to) continue;
    for (std::int64_t c = begin; c < end; ++c) {
      float sum = 0.0F;
      const float* from = partial.data<float>() + k * partial.stride(1) + c;
      for (std::int64_t group = 0; group < partial.size(0); ++group) sum += from[group * partial.stride(0)];
      to.data<float>()[c * to.stride(0)] += sum;
    }
  }
}

}  // namespace

void backward_simd(Context& ctx, const Backward& b) {
  const std::int64_t channels = b.x.size(1);
  const std::int64_t kernel = b.weight.size(1);
  const std::vector<TokenRun>& runs = b.runs->runs;
  const std::vector<std::size_t> groups = group_runs(runs);
  const std::int64_t padded = (channels + kGradientChannels - 1) / kGradientChannels * kGradientChannels;
  Shared shared{.taps = make_taps(ctx, b.weight, b.bias), .sum_stride = padded};
  if (b.dfinal_states) {
    // A copy also because dinitial_states may take its place before another run has read it.
    shared.dfinal_states = ctx.empty({b.runs->sequences, kernel - 1, channels});
    shared.dfinal_states.transpose(1, 2).copy_from(b.dfinal_states);
  }
  Tensor partial;
  if (b.dweight || b.dbias)
    partial = ctx.empty({static_cast<std::int64_t>(groups.size()), kernel + 1, padded});

  std::vector<Strip> strips;
  for (std::int64_t c = 0; c < channels; c += kGradientChannels) {
    for (std::size_t g = 0; g < groups.size(); ++g) {
      const std::size_t end = g + 1 < groups.size() ? groups[g + 1] : runs.size();
      strips.push_back(
          {.begin = runs.data() + groups[g],
           .end = runs.data() + end,
           .channel = c,
           .channels = std::min(kGradientChannels, channels - c),
           .sums = partial ? partial.data<float>() + static_cast<std::int64_t>(g) * partial.stride(0) + c
                           : nullptr});
    }
  }
  const auto count = static_cast<std::int64_t>(strips.size());
  // A fork costs some microseconds: about as much as 8,192 elements.
  const std::int64_t parts = std::clamp<std::int64_t>(std::min(count, b.x.numel() / 8192), 1, ctx.threads());
  const std::int64_t rows = 2 * (kGradientTokens + kernel - 1) + kGradientTokens + 1;
  const Tensor workspace = ctx.empty({parts, rows * kGradientChannels});
  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      const std::int64_t from = count * part / parts;
      HWY_DYNAMIC_DISPATCH(strips_backward)
      (b, shared, strips.data() + from, count * (part + 1) / parts - from,
       workspace.data<float>() + part * workspace.stride(0));
    }
  });
  if (partial)
    parallel_for(ctx, channels, 512,
                 [&](std::int64_t begin, std::int64_t end) { add_partial_sums(partial, b, begin, end); });
}

}  // namespace krait::conv_detail
#endif
