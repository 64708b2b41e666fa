// A Mamba-2 block's forward and backward as training runs them: what bench/python_block.py sets krait.torch's
// layer beside.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/modules/batch.h"
#include "krait/modules/mamba2.h"
#include "krait/modules/tape.h"

namespace {

using krait::Context;
using krait::DType;
using krait::Tensor;

Tensor normal(const krait::Dims& shape, DType dtype) {
  Tensor t = Tensor::empty(shape);
  krait::Rng rng(1);
  for (float& value : t.span<float>()) value = rng.normal();
  return t.to(dtype);
}

// Arguments: d_model, B, L, threads. Matrices and activations are of `dtype`, gradients of parameters f32.
void run(benchmark::State& state, DType dtype) {
  const std::int64_t d_model = state.range(0);
  const std::int64_t rows = state.range(1);
  const std::int64_t length = state.range(2);
  Context ctx({.threads = static_cast<int>(state.range(3))});
  krait::Mamba2 block({.d_model = d_model});
  krait::Rng rng(0);
  block.initialize(rng);
  std::vector<Tensor> gradients;
  block.visit("", [&](const krait::Parameter& p) {
    if (p.kind == krait::ParameterKind::matrix) p.tensor = p.tensor.to(dtype);
    gradients.push_back(p.gradient = Tensor::zeros(p.shape));
  });
  const Tensor hidden = normal({rows * length, d_model}, dtype);
  const Tensor dout = normal({rows * length, d_model}, dtype);
  const auto batch = krait::Batch::of_rows(ctx.memory(), rows, length);
  krait::Tape tape;
  for ([[maybe_unused]] auto step : state) {
    for (const Tensor& gradient : gradients) ctx.fill(gradient, 0.0);
    block.prepare(ctx);
    tape.begin();
    benchmark::DoNotOptimize(block.forward(ctx, hidden, batch, 0, &tape).raw());
    benchmark::DoNotOptimize(block.backward(ctx, dout, batch, 0, tape).raw());
  }
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(rows * length), benchmark::Counter::kIsIterationInvariantRate);
}

void mamba2_f32(benchmark::State& state) { run(state, DType::f32); }
void mamba2_bf16(benchmark::State& state) { run(state, DType::bf16); }

void shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"d", "B", "L", "t"})->Unit(benchmark::kMillisecond)->UseRealTime();
  for (const std::int64_t length : {256, 1024}) bench->Args({768, 1, length, 2});
  bench->Args({2560, 1, 256, 2});
}

}  // namespace

BENCHMARK(mamba2_f32)->Apply(shapes);
BENCHMARK(mamba2_bf16)->Apply(shapes);
