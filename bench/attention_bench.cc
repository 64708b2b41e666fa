// attention at 12 heads of 64 channels: floating-point operations for each second of a causal prefill and of
// its backward, bytes of the key and value cache for each second of a decoding step.
#include <benchmark/benchmark.h>

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/ops/attention.h"
#include "krait/ops/rotary.h"

namespace {

using krait::Context;
using krait::DType;
using krait::Tensor;

constexpr std::int64_t kHeads = 12;
constexpr std::int64_t kHeadDim = 64;

Tensor random_tensor(const krait::Dims& shape, DType dtype) {
  const Tensor t = Tensor::empty(shape);
  krait::Rng rng(1);
  for (float& value : t.span<float>()) value = rng.uniform() - 0.5F;
  return t.to(dtype);
}

void prefill(benchmark::State& state, DType dtype) {
  Context ctx;
  const std::int64_t length = state.range(0);
  const Tensor qkv = random_tensor({length, 3, kHeads, kHeadDim}, dtype);
  const Tensor out = Tensor::empty({length, kHeads, kHeadDim}, dtype);
  for ([[maybe_unused]] auto step : state)
    krait::attention(
        ctx,
        {.q = qkv.select(1, 0), .k = qkv.select(1, 1), .v = qkv.select(1, 2), .causal = true, .out = out});
  state.SetLabel(ctx.backend());
  // Two products; only pairs that the mask leaves are counted.
  const auto pairs = static_cast<double>(kHeads * length * (length + 1) / 2);
  state.counters["GFLOP/s"] =
      benchmark::Counter(4.0 * pairs * kHeadDim, benchmark::Counter::kIsIterationInvariantRate);
}

void backward(benchmark::State& state, DType dtype) {
  Context ctx;
  const std::int64_t length = state.range(0);
  const Tensor qkv = random_tensor({length, 3, kHeads, kHeadDim}, dtype);
  const Tensor dqkv = Tensor::empty({length, 3, kHeads, kHeadDim}, dtype);
  const Tensor dout = random_tensor({length, kHeads, kHeadDim}, dtype);
  const Tensor logsumexp = Tensor::empty({length, kHeads});
  const Tensor out = krait::attention(ctx, {.q = qkv.select(1, 0),
                                            .k = qkv.select(1, 1),
                                            .v = qkv.select(1, 2),
                                            .causal = true,
                                            .logsumexp = logsumexp});
  for ([[maybe_unused]] auto step : state)
    krait::attention_backward(ctx, {.q = qkv.select(1, 0),
                                    .k = qkv.select(1, 1),
                                    .v = qkv.select(1, 2),
                                    .causal = true,
                                    .out = out,
                                    .logsumexp = logsumexp,
                                    .dout = dout,
                                    .dq = dqkv.select(1, 0),
                                    .dk = dqkv.select(1, 1),
                                    .dv = dqkv.select(1, 2)});
  state.SetLabel(ctx.backend());
  // Five products.
  const auto pairs = static_cast<double>(kHeads * length * (length + 1) / 2);
  state.counters["GFLOP/s"] =
      benchmark::Counter(10.0 * pairs * kHeadDim, benchmark::Counter::kIsIterationInvariantRate);
}

void decode(benchmark::State& state, DType dtype) {
  Context ctx;
  const std::int64_t length = state.range(0);
  const std::int64_t heads_kv = state.range(1);
  const Tensor cache = random_tensor({length, 2, heads_kv, kHeadDim}, dtype);
  const Tensor q = random_tensor({1, kHeads, kHeadDim}, DType::f32);
  for ([[maybe_unused]] auto step : state)
    krait::attention(ctx, {.q = q, .k = cache.select(1, 0), .v = cache.select(1, 1), .causal = true});
  state.SetLabel(ctx.backend());
  state.counters["GB/s"] =
      benchmark::Counter(static_cast<double>(cache.nbytes()), benchmark::Counter::kIsIterationInvariantRate);
}

void rotary(benchmark::State& state) {
  Context ctx;
  const std::int64_t length = state.range(0);
  const Tensor x = random_tensor({length, kHeads, kHeadDim}, DType::f32);
  const Tensor positions = Tensor::zeros({length}, DType::i64);
  for (std::int64_t i = 0; i < length; ++i) positions.data<std::int64_t>()[i] = i;
  for ([[maybe_unused]] auto step : state)
    krait::rotary_embedding(ctx, {.x = x, .positions = positions, .dim = kHeadDim});
  state.counters["GB/s"] = benchmark::Counter(2.0 * static_cast<double>(x.nbytes()),
                                              benchmark::Counter::kIsIterationInvariantRate);
}

BENCHMARK_CAPTURE(prefill, f32, DType::f32)->ArgName("L")->Arg(512)->Arg(4096)->UseRealTime()->MinTime(0.3);
BENCHMARK_CAPTURE(prefill, bf16, DType::bf16)->ArgName("L")->Arg(512)->Arg(4096)->UseRealTime()->MinTime(0.3);
BENCHMARK_CAPTURE(backward, f32, DType::f32)->ArgName("L")->Arg(512)->Arg(4096)->UseRealTime()->MinTime(0.3);
BENCHMARK_CAPTURE(backward, bf16, DType::bf16)
    ->ArgName("L")
    ->Arg(512)
    ->Arg(4096)
    ->UseRealTime()
    ->MinTime(0.3);
BENCHMARK_CAPTURE(decode, f32, DType::f32)
    ->ArgNames({"L", "heads_kv"})
    ->Args({512, 12})
    ->Args({32768, 12})
    ->Args({32768, 2})
    ->UseRealTime()
    ->MinTime(0.3);
BENCHMARK_CAPTURE(decode, bf16, DType::bf16)
    ->ArgNames({"L", "heads_kv"})
    ->Args({32768, 12})
    ->Args({32768, 2})
    ->UseRealTime()
    ->MinTime(0.3);
BENCHMARK(rotary)->ArgName("L")->Arg(1)->Arg(512)->UseRealTime()->MinTime(0.2);

}  // namespace
