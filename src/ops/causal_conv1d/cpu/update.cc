// causal_conv1d_update on Highway: a block of channels of one batch row is turned so that lanes run over
// channels, convolved, and turned back; its state is then shifted or, in a ring, overwritten.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/causal_conv1d/cpu/update.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
//
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"
#include "core/simd/tile-inl.h"
#include "ops/causal_conv1d/conv.h"
#include "ops/causal_conv1d/cpu/rows-inl.h"

#ifndef KRAIT_OPS_CAUSAL_CONV1D_CPU_UPDATE_ONCE
#define KRAIT_OPS_CAUSAL_CONV1D_CPU_UPDATE_ONCE
namespace krait::conv_detail {
inline constexpr std::int64_t kUpdateChannels = 64;
}  // namespace krait::conv_detail
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::conv_detail::HWY_NAMESPACE {
namespace {

// `tile` has (S + 2 T) rows of kUpdateChannels: the state from the oldest input on, the inputs, the outputs.
template <typename T, typename S>
void update_block(const Update& u, const Taps& taps, const Slot& slot, std::int64_t channel,
                  std::int64_t channels, float* tile) {
  using krait::HWY_NAMESPACE::load_tile;
  using krait::HWY_NAMESPACE::store_tile;
  const std::int64_t width = taps.weight.size(0) - 1;
  const std::int64_t tokens = u.x.size(2);
  const std::int64_t states = u.conv_state.size(2);
  const std::int64_t along = u.conv_state.stride(2);
  const std::int64_t across = u.conv_state.stride(1);
  const T* x = u.x.data<T>() + slot.row * u.x.stride(0) + channel * u.x.stride(1);
  T* out = u.out.data<T>() + slot.row * u.out.stride(0) + channel * u.out.stride(1);
  S* state = u.conv_state.data<S>() + slot.state * u.conv_state.stride(0) + channel * across;
  float* inputs = tile + states * kUpdateChannels;
  float* results = inputs + tokens * kUpdateChannels;

  if (slot.ring < 0) {
    load_tile(state, along, across, states, channels, tile, kUpdateChannels);
  } else {  // only the window; its oldest input lies K - 1 places behind the one to be written
    for (std::int64_t j = 0; j < width; ++j)
      load_tile(state + (slot.ring + states - width + j) % states * along, 0, across, 1, channels,
                tile + (states - width + j) * kUpdateChannels, 0);
  }
  load_tile(x, u.x.stride(2), u.x.stride(1), tokens, channels, inputs, kUpdateChannels);
  convolve(tile + (states - width) * kUpdateChannels, kUpdateChannels,
           TapRows{taps.weight.data<float>() + channel, taps.weight.stride(0),
                   taps.bias.data<float>() + channel, width + 1, u.activation},
           results, kUpdateChannels, tokens, channels);
  store_tile(results, kUpdateChannels, out, u.out.stride(2), u.out.stride(1), tokens, channels);

  if (slot.ring < 0) {
    store_tile(tile + tokens * kUpdateChannels, kUpdateChannels, state, along, across, states, channels);
  } else {
    for (std::int64_t t = std::max<std::int64_t>(tokens - states, 0); t < tokens; ++t)
      store_tile(inputs + t * kUpdateChannels, 0, state + (slot.ring + t) % states * along, 0, across, 1,
                 channels);
  }
}

void update_blocks(const Update& u, const Taps& taps, std::int64_t begin, std::int64_t end, float* tile) {
  const std::int64_t channels = u.x.size(1);
  const std::int64_t in_row = (channels + kUpdateChannels - 1) / kUpdateChannels;
  with_storage(u.x.dtype(), [&](auto x_tag) {
    with_storage(u.conv_state.dtype(), [&](auto state_tag) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t channel = i % in_row * kUpdateChannels;
        update_block<decltype(x_tag), decltype(state_tag)>(
            u, taps, (*u.slots)[static_cast<std::size_t>(i / in_row)], channel,
            std::min(kUpdateChannels, channels - channel), tile);
      }
    });
  });
}

}  // namespace
}  // namespace krait::conv_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::conv_detail {

HWY_EXPORT(update_blocks);

void update_simd(Context& ctx, const Update& u) {
  const Taps taps = make_taps(ctx, u.weight, u.bias);
  const std::int64_t channels = u.x.size(1);
  const std::int64_t in_row = (channels + kUpdateChannels - 1) / kUpdateChannels;
  const std::int64_t count = static_cast<std::int64_t>(u.slots->size()) * in_row;
  const std::int64_t rows = u.conv_state.size(2) + 2 * u.x.size(2);
  // A fork costs some microseconds: about as much as 8,192 channels.
  const std::int64_t outputs = static_cast<std::int64_t>(u.slots->size()) * channels * u.x.size(2);
  const std::int64_t parts = std::clamp<std::int64_t>(std::min(count, outputs / 8192), 1, ctx.threads());
  const Tensor tiles = ctx.empty({parts, rows * kUpdateChannels});
  parallel_for(ctx, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) HWY_DYNAMIC_DISPATCH(update_blocks)
    (u, taps, count * part / parts, count * (part + 1) / parts, tiles.data<float>() + part * tiles.stride(0));
  });
}

}  // namespace krait::conv_detail
#endif
