// The activations of a gated MLP and their backward: bytes moved for each second, against the memory's
// bandwidth.
#include <benchmark/benchmark.h>

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/ops/activation.h"

namespace {

using krait::Context;
using krait::DType;
using krait::Tensor;

const krait::Dims kShape{2048, 2048};

Tensor random_tensor(DType dtype) {
  const Tensor t = Tensor::empty(kShape);
  krait::Rng rng(1);
  for (float& value : t.span<float>()) value = 4.0F * rng.uniform() - 2.0F;
  return t.to(dtype);
}

void finish(benchmark::State& state, const Context& ctx, std::size_t bytes) {
  state.SetLabel(ctx.backend());
  state.counters["GB/s"] =
      benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate);
}

void gated_silu(benchmark::State& state, DType dtype) {
  Context ctx;
  const Tensor x = random_tensor(dtype);
  const Tensor gate = random_tensor(dtype);
  const Tensor out = random_tensor(dtype);
  for ([[maybe_unused]] auto step : state) krait::gated_silu(ctx, {.x = x, .gate = gate, .out = out});
  finish(state, ctx, 3 * x.nbytes());
}

void gated_silu_backward(benchmark::State& state, DType dtype) {
  Context ctx;
  const Tensor x = random_tensor(dtype);
  const Tensor gate = random_tensor(dtype);
  const Tensor dout = random_tensor(dtype);
  const Tensor dx = random_tensor(dtype);
  const Tensor dgate = random_tensor(dtype);
  for ([[maybe_unused]] auto step : state)
    krait::gated_silu_backward(ctx, {.x = x, .gate = gate, .dout = dout, .dx = dx, .dgate = dgate});
  finish(state, ctx, 5 * x.nbytes());
}

void gelu_backward(benchmark::State& state, krait::GeluKind kind, DType dtype) {
  Context ctx;
  const Tensor x = random_tensor(dtype);
  const Tensor dout = random_tensor(dtype);
  const Tensor dx = random_tensor(dtype);
  for ([[maybe_unused]] auto step : state)
    krait::gelu_backward(ctx, {.x = x, .dout = dout, .dx = dx, .kind = kind});
  finish(state, ctx, 3 * x.nbytes());
}

void settings(benchmark::internal::Benchmark* b) { b->UseRealTime()->MinTime(0.2); }

BENCHMARK_CAPTURE(gated_silu, f32, DType::f32)->Apply(settings);
BENCHMARK_CAPTURE(gated_silu, bf16, DType::bf16)->Apply(settings);
BENCHMARK_CAPTURE(gated_silu_backward, f32, DType::f32)->Apply(settings);
BENCHMARK_CAPTURE(gated_silu_backward, bf16, DType::bf16)->Apply(settings);
BENCHMARK_CAPTURE(gelu_backward, exact_f32, krait::GeluKind::exact, DType::f32)->Apply(settings);
BENCHMARK_CAPTURE(gelu_backward, tanh_f32, krait::GeluKind::tanh, DType::f32)->Apply(settings);

}  // namespace
