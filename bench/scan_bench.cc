// selective_scan and state_update on the shapes of published models.
#include <benchmark/benchmark.h>

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/ops/selective_scan.h"
#include "krait/ops/state_update.h"

namespace krait {
namespace {

Tensor random(Rng& rng, const Dims& shape, DType dtype, float low, float high) {
  const Tensor numbers = Tensor::empty(shape);
  for (float& x : numbers.span<float>()) x = low + (high - low) * rng.uniform();
  return numbers.to(dtype);
}

// Channel-last, as the Mamba block has it: u, delta and z are (B, L, D) in memory, B and C (B, L, N).
SelectiveScanArgs scan_args(std::int64_t batch, std::int64_t channels, std::int64_t length,
                            std::int64_t d_state, DType dtype, bool channel_last) {
  Rng rng(1);
  const auto sequence = [&](float low, float high) {
    return channel_last ? random(rng, {batch, length, channels}, dtype, low, high).transpose(1, 2)
                        : random(rng, {batch, channels, length}, dtype, low, high);
  };
  const auto factor = [&] {
    return channel_last ? random(rng, {batch, length, d_state}, dtype, -1, 1).transpose(1, 2)
                        : random(rng, {batch, d_state, length}, dtype, -1, 1);
  };
  SelectiveScanArgs args;
  args.u = sequence(-1, 1);
  args.delta = sequence(-1, 1);
  args.A = Tensor::empty({channels, d_state});
  for (std::int64_t i = 0; i < args.A.numel(); ++i)
    args.A.data<float>()[i] = -static_cast<float>(1 + i % d_state);
  args.B = factor();
  args.C = factor();
  args.D = random(rng, {channels}, DType::f32, -1, 1);
  args.z = sequence(-1, 1);
  args.delta_bias = random(rng, {channels}, DType::f32, -6, -3);
  args.delta_softplus = true;
  args.return_last_state = true;
  args.out = args.u.clone().transpose(1, 2).contiguous().transpose(1, 2);
  if (!channel_last) args.out = args.u.clone();
  return args;
}

void scan(benchmark::State& state, std::int64_t batch, std::int64_t channels, std::int64_t length,
          std::int64_t d_state, DType dtype, bool channel_last, int threads) {
  const SelectiveScanArgs args = scan_args(batch, channels, length, d_state, dtype, channel_last);
  Context ctx({.threads = threads});
  for (auto _ : state) benchmark::DoNotOptimize(selective_scan(ctx, args));
  const double steps = static_cast<double>(batch * channels * length * d_state);
  state.counters["state_steps/s"] = benchmark::Counter(steps, benchmark::Counter::kIsIterationInvariantRate);
}

#define KRAIT_SCAN(name, ...) \
  BENCHMARK_CAPTURE(scan, name, __VA_ARGS__)->UseRealTime()->Unit(benchmark::kMillisecond)
KRAIT_SCAN(channel_last_f32_1_thread, 1, 1536, 512, 16, DType::f32, true, 1);
KRAIT_SCAN(channel_last_f32, 1, 1536, 512, 16, DType::f32, true, 2);
KRAIT_SCAN(channel_last_bf16, 1, 1536, 512, 16, DType::bf16, true, 2);
KRAIT_SCAN(channel_first_f32, 1, 1536, 512, 16, DType::f32, false, 2);
KRAIT_SCAN(channel_first_bf16, 1, 1536, 512, 16, DType::bf16, false, 2);
KRAIT_SCAN(channel_last_f32_N64, 1, 1536, 512, 64, DType::f32, true, 2);
KRAIT_SCAN(channel_last_f32_N1, 1, 1536, 512, 1, DType::f32, true, 2);
KRAIT_SCAN(channel_last_f32_long, 1, 1536, 4096, 16, DType::f32, true, 2);
KRAIT_SCAN(one_token, 1, 1536, 1, 16, DType::f32, true, 2);

// One token of `batch` sequences, and the bytes of state read and written in a second. `headdim` 0: Mamba-1.
void update(benchmark::State& state, std::int64_t batch, std::int64_t channels, std::int64_t headdim,
            std::int64_t d_state, int threads) {
  Rng rng(1);
  const bool heads = headdim > 0;
  const Dims x_shape = heads ? Dims{batch, channels, headdim} : Dims{batch, channels};
  StateUpdateArgs args;
  args.state =
      heads ? Tensor::zeros({batch, channels, headdim, d_state}) : Tensor::zeros({batch, channels, d_state});
  args.x = random(rng, x_shape, DType::f32, -1, 1);
  args.dt = random(rng, heads ? Dims{batch, channels} : x_shape, DType::f32, -1, 1);
  args.A = random(rng, heads ? Dims{channels} : Dims{channels, d_state}, DType::f32, -16, -1);
  args.B = random(rng, {batch, d_state}, DType::f32, -1, 1);
  args.C = random(rng, {batch, d_state}, DType::f32, -1, 1);
  args.D = random(rng, {channels}, DType::f32, -1, 1);
  args.dt_bias = random(rng, {channels}, DType::f32, -6, -3);
  args.dt_softplus = true;
  args.out = args.x.clone();
  Context ctx({.threads = threads});
  for (auto _ : state) benchmark::DoNotOptimize(state_update(ctx, args));
  state.counters["state_bytes/s"] = benchmark::Counter(2 * static_cast<double>(args.state.nbytes()),
                                                       benchmark::Counter::kIsIterationInvariantRate);
}

#define KRAIT_UPDATE(name, ...) \
  BENCHMARK_CAPTURE(update, name, __VA_ARGS__)->UseRealTime()->Unit(benchmark::kMicrosecond)
KRAIT_UPDATE(mamba1_130m_1_thread, 1, 1536, 0, 16, 1);
KRAIT_UPDATE(mamba1_130m, 1, 1536, 0, 16, 2);
KRAIT_UPDATE(mamba1_130m_batch_8, 8, 1536, 0, 16, 2);
KRAIT_UPDATE(mamba2_130m_1_thread, 1, 24, 64, 128, 1);
KRAIT_UPDATE(mamba2_130m, 1, 24, 64, 128, 2);
KRAIT_UPDATE(mamba2_2_7b, 1, 80, 64, 128, 2);
// More state than any cache holds.
KRAIT_UPDATE(mamba2_2_7b_batch_64, 64, 80, 64, 128, 2);

}  // namespace
}  // namespace krait
