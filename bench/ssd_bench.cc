// ssd and causal_conv1d over the shapes of real models: floating-point operations for each second of the
// products that the chunked algorithm is made of, bytes for each second of the convolution.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/ops/causal_conv1d.h"
#include "krait/ops/ssd.h"

namespace {

using krait::Context;
using krait::DType;
using krait::SsdPath;
using krait::Tensor;

Tensor random_tensor(const krait::Dims& shape, float low, float high, DType dtype = DType::f32) {
  Tensor t = Tensor::empty(shape);
  krait::Rng rng(1);
  for (float& value : t.span<float>()) value = low + (high - low) * rng.uniform();
  return t.to(dtype);
}

// Arguments: L, H, P, N, G, threads, chunk_size (0: automatic).
void run_ssd(benchmark::State& state, SsdPath path, DType dtype) {
  const std::int64_t L = state.range(0);
  const std::int64_t H = state.range(1);
  const std::int64_t P = state.range(2);
  const std::int64_t N = state.range(3);
  const std::int64_t G = state.range(4);
  Context ctx({.threads = static_cast<int>(state.range(5))});
  const Tensor states = Tensor::zeros({1, H, P, N});
  const krait::SsdArgs args{.x = random_tensor({1, L, H, P}, -1, 1, dtype),
                            .dt = random_tensor({1, L, H}, -4, 0, dtype),
                            .A = random_tensor({H}, -16, -1),
                            .B = random_tensor({1, L, G, N}, -1, 1, dtype),
                            .C = random_tensor({1, L, G, N}, -1, 1, dtype),
                            .D = random_tensor({H}, -1, 1),
                            .dt_bias = random_tensor({H}, -1, 1),
                            .initial_states = states,
                            .dt_softplus = true,
                            .chunk_size = state.range(6),
                            .return_final_states = true,
                            .out = Tensor::empty({1, L, H, P}, dtype),
                            .final_states = states,
                            .path = path};
  for ([[maybe_unused]] auto step : state) krait::ssd(ctx, args);
  state.SetLabel(ctx.backend());
  // The work that any chunked algorithm has: for each token and head two products of P x N with the state,
  // and half of a Q x P one with the masked matrix; C B^T is shared by the heads.
  const auto Q = static_cast<double>(
      std::min(L, state.range(6) > 0 ? state.range(6) : krait::choose_ssd(L, P, N).chunk_size));
  const double flop =
      static_cast<double>(L) *
      (static_cast<double>(H * P) * (4.0 * static_cast<double>(N) + Q) + Q * static_cast<double>(G * N));
  state.counters["FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(L), benchmark::Counter::kIsIterationInvariantRate);
}

void ssd_chunked(benchmark::State& state) { run_ssd(state, SsdPath::chunked, DType::f32); }
void ssd_chunked_bf16(benchmark::State& state) { run_ssd(state, SsdPath::chunked, DType::bf16); }
void ssd_recurrent(benchmark::State& state) { run_ssd(state, SsdPath::recurrent, DType::f32); }

// mamba2-130m (H 24) and mamba2-2.7b (H 80).
BENCHMARK(ssd_chunked)
    ->Args({512, 24, 64, 128, 1, 1, 0})
    ->Args({512, 24, 64, 128, 1, 2, 0})
    ->Args({4096, 24, 64, 128, 1, 2, 0})
    ->Args({2048, 80, 64, 128, 1, 2, 0})
    ->Args({4096, 24, 64, 128, 1, 2, 32})
    ->Args({4096, 24, 64, 128, 1, 2, 64})
    ->Args({4096, 24, 64, 128, 1, 2, 96})
    ->Args({4096, 24, 64, 128, 1, 2, 128})
    ->Args({2048, 24, 64, 16, 1, 2, 0})
    ->UseRealTime();
BENCHMARK(ssd_chunked_bf16)->Args({4096, 24, 64, 128, 1, 2, 0})->UseRealTime();
BENCHMARK(ssd_recurrent)->Args({512, 24, 64, 128, 1, 2, 0})->UseRealTime();
// Where the two paths cross.
// Which chunk size pays for small and large states.
BENCHMARK(ssd_chunked)
    ->ArgsProduct({{1024}, {8}, {64}, {16, 64, 256}, {1}, {1}, {16, 32, 64, 96, 128, 256}})
    ->UseRealTime();
BENCHMARK(ssd_recurrent)->ArgsProduct({{1024}, {8}, {64}, {16, 64, 256}, {1}, {1}, {0}})->UseRealTime();
BENCHMARK(ssd_recurrent)->ArgsProduct({{2, 4, 8, 16, 32}, {24}, {64}, {128}, {1}, {1}, {0}})->UseRealTime();
BENCHMARK(ssd_chunked)->ArgsProduct({{2, 4, 8, 16, 32}, {24}, {64}, {128}, {1}, {1}, {0}})->UseRealTime();

// Arguments: L, D, channel-last or not.
void run_conv(benchmark::State& state, DType dtype) {
  Context ctx({.threads = 2});
  const std::int64_t L = state.range(0);
  const std::int64_t D = state.range(1);
  const bool channel_last = state.range(2) != 0;
  const auto view = [&](const Tensor& t) { return channel_last ? t.transpose(1, 2) : t; };
  const krait::Dims shape = channel_last ? krait::Dims{1, L, D} : krait::Dims{1, D, L};
  const Tensor x = random_tensor(shape, -1, 1, dtype);
  const Tensor out = Tensor::zeros(shape, dtype);
  const krait::CausalConv1dArgs args{.x = view(x),
                                     .weight = random_tensor({D, 4}, -1, 1),
                                     .bias = random_tensor({D}, -1, 1),
                                     .activation = krait::Activation::silu,
                                     .out = view(out)};
  for ([[maybe_unused]] auto step : state) krait::causal_conv1d(ctx, args);
  state.SetLabel(ctx.backend());
  state.counters["B/s"] = benchmark::Counter(static_cast<double>(x.nbytes() + out.nbytes()),
                                             benchmark::Counter::kIsIterationInvariantRate);
}

void conv(benchmark::State& state) { run_conv(state, DType::f32); }
void conv_bf16(benchmark::State& state) { run_conv(state, DType::bf16); }
BENCHMARK(conv)->Args({512, 1792, 1})->Args({16384, 1792, 1})->Args({16384, 1792, 0})->UseRealTime();
BENCHMARK(conv_bf16)->Args({16384, 1792, 1})->Args({16384, 1792, 0})->UseRealTime();

void conv_update(benchmark::State& state) {
  Context ctx({.threads = 2});
  const std::int64_t rows = state.range(0);
  const std::int64_t D = state.range(1);
  const Tensor conv_state = Tensor::zeros({rows, D, 4});
  const krait::CausalConv1dUpdateArgs args{.x = random_tensor({rows, D}, -1, 1),
                                           .conv_state = conv_state,
                                           .weight = random_tensor({D, 4}, -1, 1),
                                           .bias = random_tensor({D}, -1, 1),
                                           .activation = krait::Activation::silu,
                                           .out = Tensor::empty({rows, D})};
  for ([[maybe_unused]] auto step : state) krait::causal_conv1d_update(ctx, args);
  state.counters["B/s"] = benchmark::Counter(2.0 * static_cast<double>(conv_state.nbytes() + args.x.nbytes()),
                                             benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(conv_update)->Args({1, 1792})->Args({256, 1792})->UseRealTime();

}  // namespace
