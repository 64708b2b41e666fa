// causal_conv1d on Highway. Channel-last inputs are convolved row by row with lanes over channels,
// channel-first ones line by line with lanes over time, both straight from and to memory. The first K - 1
// tokens of a run (which read the initial state), runs with padding inside and other layouts pass through
// small tiles of f32.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/causal_conv1d/cpu/forward.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "core/simd/tile-inl.h"
#include "ops/causal_conv1d/conv.h"
#include "ops/causal_conv1d/cpu/rows-inl.h"

#ifndef KRAIT_OPS_CAUSAL_CONV1D_CPU_FORWARD_ONCE
#define KRAIT_OPS_CAUSAL_CONV1D_CPU_FORWARD_ONCE
namespace krait::conv_detail {

// Work of one thread at a time: tokens [begin, end) of a run, channels [channel, channel + channels).
struct Block {
  const TokenRun* run = nullptr;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t channel = 0;
  std::int64_t channels = 0;
};

// K + 3 rows of inputs and 4 of outputs of a block stay in the first-level cache.
inline constexpr std::int64_t kBlockChannels = 512;
inline constexpr std::int64_t kBlockTokens = 128;
// Of a staged tile.
inline constexpr std::int64_t kTileChannels = 64;
inline constexpr std::int64_t kTileTokens = 64;

}  // namespace krait::conv_detail
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::conv_detail::HWY_NAMESPACE {
namespace {

TapRows taps_at(const Forward& f, const Taps& taps, std::int64_t channel) {
  return {taps.weight.data<float>() + channel, taps.weight.stride(0), taps.bias.data<float>() + channel,
          taps.weight.size(0), f.activation};
}

// Tokens [begin, end) by way of f32 tiles: any layout, any positions, the initial state included.
template <typename T>
void convolve_staged(const Forward& f, const Taps& taps, const Block& block, std::int64_t begin,
                     std::int64_t end, float* tile) {
  using krait::HWY_NAMESPACE::load_tile;
  using krait::HWY_NAMESPACE::store_tile;
  const std::int64_t width = taps.weight.size(0) - 1;
  const TokenRun& run = *block.run;
  const T* x = f.x.data<T>() + run.row * f.x.stride(0);
  T* out = f.out.data<T>() + run.row * f.out.stride(0);
  for (std::int64_t c0 = block.channel; c0 < block.channel + block.channels; c0 += kTileChannels) {
    const std::int64_t channels = std::min(kTileChannels, block.channel + block.channels - c0);
    for (std::int64_t t0 = begin; t0 < end; t0 += kTileTokens) {
      const std::int64_t tokens = std::min(kTileTokens, end - t0);
      for (std::int64_t r = 0; r < tokens + width; ++r) {
        float* row = tile + r * kTileChannels;
        const std::int64_t i = t0 - width + r;
        if (i >= 0) {
          load_tile(x + f.runs->position(run, i) * f.x.stride(2) + c0 * f.x.stride(1), 0, f.x.stride(1), 1,
                    channels, row, 0);
        } else if (run.first && f.initial_states) {
          const Tensor& from = f.initial_states;
          load_tile(from.dtype(), from.raw(),
                    run.sequence * from.stride(0) + c0 * from.stride(1) + (i + width) * from.stride(2), 0,
                    from.stride(1), 1, channels, row, 0);
        } else {
          std::fill_n(row, channels, 0.0F);
        }
      }
      float* results = tile + (kTileTokens + width) * kTileChannels;
      convolve(tile, kTileChannels, taps_at(f, taps, c0), results, kTileChannels, tokens, channels);
      for (std::int64_t t = 0; t < tokens; ++t)
        store_tile(results + t * kTileChannels, 0,
                   out + f.runs->position(run, t0 + t) * f.out.stride(2) + c0 * f.out.stride(1), 0,
                   f.out.stride(1), 1, channels);
    }
  }
}

// One channel over contiguous time: x is the oldest tap of the first output.
template <typename T>
void convolve_line(const T* HWY_RESTRICT x, const TapRows& taps, T* HWY_RESTRICT out, std::int64_t count) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::int64_t t = 0;
  for (; t + lanes <= count; t += lanes) {
    auto sum = hn::Set(d, *taps.bias);
    for (std::int64_t k = 0; k < taps.kernel; ++k)
      sum = hn::MulAdd(hn::Set(d, taps.weight[k * taps.stride]), load_f32(d, x + t + k), sum);
    store_f32(d, finish(d, sum, taps.activation), out + t);
  }
  if (t < count) {
    const auto rest = static_cast<std::size_t>(count - t);
    auto sum = hn::Set(d, *taps.bias);
    for (std::int64_t k = 0; k < taps.kernel; ++k)
      sum = hn::MulAdd(hn::Set(d, taps.weight[k * taps.stride]), load_f32_n(d, x + t + k, rest), sum);
    store_f32_n(d, finish(d, sum, taps.activation), out + t, rest);
  }
}

template <typename T>
void convolve_block(const Forward& f, const Taps& taps, const Block& block, float* tile) {
  const TokenRun& run = *block.run;
  const std::int64_t width = taps.weight.size(0) - 1;
  const bool rows = f.x.stride(1) == 1 && f.out.stride(1) == 1;
  const bool lines = f.x.stride(2) == 1 && f.out.stride(2) == 1;
  const bool direct = run.listed < 0 && (rows || lines);
  const std::int64_t staged_end = direct ? std::clamp(width, block.begin, block.end) : block.end;
  if (block.begin < staged_end) convolve_staged<T>(f, taps, block, block.begin, staged_end, tile);
  if (staged_end == block.end) return;

  const std::int64_t position = run.start + staged_end;
  const std::int64_t tokens = block.end - staged_end;
  const T* x = f.x.data<T>() + run.row * f.x.stride(0) + (position - width) * f.x.stride(2) +
               block.channel * f.x.stride(1);
  T* out = f.out.data<T>() + run.row * f.out.stride(0) + position * f.out.stride(2) +
           block.channel * f.out.stride(1);
  if (rows) {
    convolve(x, f.x.stride(2), taps_at(f, taps, block.channel), out, f.out.stride(2), tokens, block.channels);
  } else {
    for (std::int64_t c = 0; c < block.channels; ++c)
      convolve_line(x + c * f.x.stride(1), taps_at(f, taps, block.channel + c), out + c * f.out.stride(1),
                    tokens);
  }
}

void convolve_blocks(const Forward& f, const Taps& taps, const Block* blocks, std::int64_t count,
                     float* tile) {
  with_storage(f.x.dtype(), [&](auto tag) {
    for (std::int64_t i = 0; i < count; ++i) convolve_block<decltype(tag)>(f, taps, blocks[i], tile);
  });
}

void load_taps(const Tensor& weight, const Tensor& bias, const Taps& to) {
  krait::HWY_NAMESPACE::load_tile(weight.dtype(), weight.raw(), 0, weight.stride(1), weight.stride(0),
                                  weight.size(1), weight.size(0), to.weight.data<float>(), weight.size(0));
  if (bias)
    krait::HWY_NAMESPACE::load_tile(bias.dtype(), bias.raw(), 0, 0, bias.stride(0), 1, bias.size(0),
                                    to.bias.data<float>(), 0);
}

}  // namespace
}  // namespace krait::conv_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::conv_detail {

HWY_EXPORT(convolve_blocks);
HWY_EXPORT(load_taps);

Taps make_taps(Context& ctx, const Tensor& weight, const Tensor& bias) {
  const std::int64_t channels = weight.size(0);
  Taps taps{ctx.empty({weight.size(1), channels}), bias ? ctx.empty({channels}) : ctx.zeros({channels})};
  HWY_DYNAMIC_DISPATCH(load_taps)(weight, bias, taps);
  return taps;
}

void forward_simd(Context& ctx, const Forward& f) {
  const Taps taps = make_taps(ctx, f.weight, f.bias);
  const std::int64_t channels = f.x.size(1);
  // Lines are long in time and need no neighbouring channels.
  const bool rows = f.x.stride(1) == 1 && f.out.stride(1) == 1;
  const std::int64_t block_channels = rows ? kBlockChannels : kTileChannels;
  const std::int64_t block_tokens = rows ? kBlockTokens : 1024;
  std::vector<Block> blocks;
  for (const TokenRun& run : f.runs->runs)
    for (std::int64_t t = 0; t < run.count; t += block_tokens)
      for (std::int64_t c = 0; c < channels; c += block_channels)
        blocks.push_back(
            {&run, t, std::min(t + block_tokens, run.count), c, std::min(block_channels, channels - c)});

  const auto count = static_cast<std::int64_t>(blocks.size());
  // A fork costs some microseconds: about as much as 16,384 outputs.
  const std::int64_t outputs = f.x.numel();
  const std::int64_t parts = std::clamp<std::int64_t>(std::min(count, outputs / 16384), 1, ctx.threads());
  const Tensor tiles = ctx.empty({parts, (2 * kTileTokens + f.weight.size(1) - 1) * kTileChannels});
  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      const std::int64_t from = count * part / parts;
      HWY_DYNAMIC_DISPATCH(convolve_blocks)
      (f, taps, blocks.data() + from, count * (part + 1) / parts - from,
       tiles.data<float>() + part * tiles.stride(0));
    }
  });
}

}  // namespace krait::conv_detail
#endif
