// causal_conv1d and its backward, channel-last as the Mamba blocks call it: x is a column range of the
// projected matrix. Bytes moved for each second, against the memory's bandwidth.
#include <benchmark/benchmark.h>

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/ops/causal_conv1d.h"

namespace {

using krait::Context;
using krait::DType;
using krait::Tensor;

// The sizes of mamba2-130m: a conv over 1,792 of 3,352 projected columns, 4 taps.
constexpr std::int64_t kChannels = 1792;
constexpr std::int64_t kColumns = 3352;
constexpr std::int64_t kRows = 2;
constexpr std::int64_t kTokens = 256;

// (B, D, L) with channels side by side, `columns` apart from token to token.
Tensor channel_last(std::int64_t columns, DType dtype) {
  const Tensor t = Tensor::empty({kRows, kTokens, columns});
  krait::Rng rng(1);
  for (float& value : t.span<float>()) value = rng.uniform() - 0.5F;
  return t.to(dtype).slice(2, columns - kChannels, columns).transpose(1, 2);
}

void finish(benchmark::State& state, const Context& ctx, std::size_t bytes) {
  state.SetLabel(ctx.backend());
  state.counters["GB/s"] =
      benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate);
}

void conv(benchmark::State& state, DType dtype) {
  Context ctx;
  const Tensor x = channel_last(kColumns, dtype);
  const Tensor weight = Tensor::zeros({kChannels, 4});
  const Tensor out = channel_last(kChannels, dtype);
  for ([[maybe_unused]] auto step : state)
    krait::causal_conv1d(ctx, {.x = x, .weight = weight, .activation = krait::Activation::silu, .out = out});
  finish(state, ctx, 2 * x.nbytes());
}

void conv_backward(benchmark::State& state, DType dtype) {
  Context ctx;
  const Tensor x = channel_last(kColumns, dtype);
  const Tensor weight = Tensor::zeros({kChannels, 4});
  const Tensor bias = Tensor::zeros({kChannels});
  const Tensor dout = channel_last(kChannels, dtype);
  const Tensor dx = channel_last(kColumns, dtype);
  const Tensor dweight = Tensor::zeros({kChannels, 4});
  const Tensor dbias = Tensor::zeros({kChannels});
  for ([[maybe_unused]] auto step : state)
    krait::causal_conv1d_backward(ctx, {.x = x,
                                        .weight = weight,
                                        .bias = bias,
                                        .activation = krait::Activation::silu,
                                        .dout = dout,
                                        .dx = dx,
                                        .dweight = dweight,
                                        .dbias = dbias});
  finish(state, ctx, 3 * x.nbytes());
}

BENCHMARK_CAPTURE(conv, f32, DType::f32)->UseRealTime();
BENCHMARK_CAPTURE(conv, bf16, DType::bf16)->UseRealTime();
BENCHMARK_CAPTURE(conv_backward, f32, DType::f32)->UseRealTime();
BENCHMARK_CAPTURE(conv_backward, bf16, DType::bf16)->UseRealTime();

}  // namespace
