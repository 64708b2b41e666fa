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

// Three tiles fill the first-level cache.
inline constexpr std::int64_t kGradientTokens = 32;
inline constexpr std::int64_t kGradientChannels = 64;

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

// gradient *= silu'(sum).
void activation_backward(const float* HWY_RESTRICT sum, float* HWY_RESTRICT gradient, std::int64_t rows,
                         std::int64_t columns) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t r = 0; r < rows; ++r, sum += kGradientChannels, gradient += kGradientChannels) {
    for (std::int64_t c = 0; c < columns; c += lanes) {
      V value = hn::Zero(d);
      V derivative = value;
      krait::HWY_NAMESPACE::silu_with_derivative(d, hn::Load(d, sum + c), value, derivative);
      hn::Store(hn::Mul(hn::Load(d, gradient + c), derivative), d, gradient + c);
    }
  }
}

// sums_k += sum over rows of gradient times the input K - 1 - k rows before it, sums_K += that of gradient.
// Even and odd rows are summed apart, for two chains of additions.
template <int kKernel>
void add_sums(const float* HWY_RESTRICT x, const float* HWY_RESTRICT gradient, std::int64_t rows,
              std::int64_t columns, float* HWY_RESTRICT sums, std::int64_t sum_stride) {
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  constexpr std::int64_t kStep = kGradientChannels;
  for (std::int64_t c = 0; c < columns; c += lanes) {
    V even[kKernel + 1];
    V odd[kKernel + 1];
    for (int k = 0; k <= kKernel; ++k) even[k] = odd[k] = hn::Zero(d);
    const float* from = x + c;
    const float* g = gradient + c;
    std::int64_t r = 0;
    for (; r + 2 <= rows; r += 2, from += 2 * kStep, g += 2 * kStep) {
      const V first = hn::Load(d, g);
      const V second = hn::Load(d, g + kStep);
      V input = hn::Load(d, from);
      for (int k = 0; k < kKernel; ++k) {
        even[k] = hn::MulAdd(first, input, even[k]);
        input = hn::Load(d, from + (k + 1) * kStep);
        odd[k] = hn::MulAdd(second, input, odd[k]);
      }
      even[kKernel] = hn::Add(even[kKernel], first);
      odd[kKernel] = hn::Add(odd[kKernel], second);
    }
    if (r < rows) {
      const V last = hn::Load(d, g);
      for (int k = 0; k < kKernel; ++k) even[k] = hn::MulAdd(last, hn::Load(d, from + k * kStep), even[k]);
      even[kKernel] = hn::Add(even[kKernel], last);
    }
    for (int k = 0; k <= kKernel; ++k) {
      float* to = sums + k * sum_stride + c;
      hn::Store(hn::Add(hn::Load(d, to), hn::Add(even[k], odd[k])), d, to);
    }
  }
}

// The same for any K, a tap at a time.
void add_sums(std::int64_t kernel, const float* HWY_RESTRICT x, const float* HWY_RESTRICT gradient,
              std::int64_t rows, std::int64_t columns, float* HWY_RESTRICT sums, std::int64_t sum_stride) {
  switch (kernel) {
    case 2: return add_sums<2>(x, gradient, rows, columns, sums, sum_stride);
    case 3: return add_sums<3>(x, gradient, rows, columns, sums, sum_stride);
    case 4: return add_sums<4>(x, gradient, rows, columns, sums, sum_stride);
    default: break;
  }
  const D d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t k = 0; k <= kernel; ++k) {
    for (std::int64_t c = 0; c < columns; c += lanes) {
      V sum = hn::Zero(d);
      for (std::int64_t r = 0; r < rows; ++r) {
        const V g = hn::Load(d, gradient + r * kGradientChannels + c);
        sum = k == kernel ? hn::Add(sum, g)
                          : hn::MulAdd(g, hn::Load(d, x + (r + k) * kGradientChannels + c), sum);
      }
      float* to = sums + k * sum_stride + c;
      hn::Store(hn::Add(hn::Load(d, to), sum), d, to);
    }
  }
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
  const bool sums = b.dweight || b.dbias;
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
    if (silu || b.dweight) load_tokens(b.x, *b.runs, run, begin, tokens_end, strip, new_x);
    if (silu) {
      convolve(tiles.x, kGradientChannels, taps, tiles.result, kGradientChannels, tokens, columns);
      activation_backward(tiles.result, new_gradient, tokens, columns);
    }
    if (sums) add_sums(kernel, tiles.x, new_gradient, tokens, columns, strip.sums, shared.sum_stride);
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

// `workspace` has workspace_floats(K) floats.
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
