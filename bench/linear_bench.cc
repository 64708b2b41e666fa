// linear over the shapes of real models: bytes of weight for each second where few rows meet the weights,
// floating-point operations for each second where many do.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <utility>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/ops/linear.h"

namespace {

using krait::Context;
using krait::DType;
using krait::LinearPath;
using krait::Tensor;

Tensor random_tensor(const krait::Dims& shape, DType dtype) {
  Tensor t = Tensor::empty(shape);
  krait::Rng rng(1);
  for (float& value : t.span<float>()) value = rng.uniform() - 0.5F;
  return t.to(dtype);
}

void run_linear(benchmark::State& state, LinearPath path, DType dtype) {
  Context ctx;
  const std::int64_t rows = state.range(0);
  const std::int64_t in = state.range(1);
  const std::int64_t out = state.range(2);
  const Tensor x = random_tensor({rows, in}, DType::f32);
  // Several weights in turn, more than the caches hold, as the layers of a model are.
  const std::int64_t bytes = in * out * static_cast<std::int64_t>(krait::size_of(dtype));
  const std::int64_t layers = rows <= 16 ? 200'000'000 / bytes + 1 : 1;
  const Tensor weight = random_tensor({1, out, in}, dtype);
  const Tensor weights = Tensor::empty({layers, out, in}, dtype);
  weights.copy_from(weight.expand({layers, out, in}));
  const Tensor y = Tensor::empty({rows, out});
  std::int64_t layer = 0;
  for ([[maybe_unused]] auto step : state) {
    linear(ctx, {.x = x, .weight = weights.select(0, layer), .out = y, .path = path});
    layer = (layer + 1) % layers;
  }
  state.SetLabel(ctx.backend());
  state.counters["GB/s"] =
      benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["GFLOP/s"] = benchmark::Counter(2.0 * static_cast<double>(rows * in * out),
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

void few_rows(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "in", "out"})->UseRealTime()->MinTime(0.3);
  for (const std::int64_t rows : {1, 2, 4, 8, 16})
    for (const auto& [in, out] : {std::pair<std::int64_t, std::int64_t>{768, 3072}, {768, 50280}})
      b->Args({rows, in, out});
  for (const auto& [in, out] : {std::pair<std::int64_t, std::int64_t>{1536, 768}, {1536, 80}, {48, 1536}})
    b->Args({1, in, out});
}

// Where the blocked product overtakes the streamed one.
void crossover(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "in", "out"})->UseRealTime()->MinTime(0.3);
  for (const std::int64_t rows : {24, 32, 48}) b->Args({rows, 768, 3072});
}

void many_rows(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "in", "out"})->UseRealTime()->MinTime(0.3);
  for (const std::int64_t rows : {16, 24, 32, 48, 64, 512, 1024}) b->Args({rows, 768, 3072});
  b->Args({1024, 1536, 768});
}

BENCHMARK_CAPTURE(run_linear, gemv_bf16, LinearPath::gemv, DType::bf16)->Apply(few_rows);
BENCHMARK_CAPTURE(run_linear, gemv_f16, LinearPath::gemv, DType::f16)->Apply(few_rows);
BENCHMARK_CAPTURE(run_linear, gemv_f32, LinearPath::gemv, DType::f32)->Apply(few_rows);
BENCHMARK_CAPTURE(run_linear, gemv_bf16, LinearPath::gemv, DType::bf16)->Apply(crossover);
BENCHMARK_CAPTURE(run_linear, gemv_f32, LinearPath::gemv, DType::f32)->Apply(crossover);
BENCHMARK_CAPTURE(run_linear, gemm_bf16, LinearPath::gemm, DType::bf16)->Apply(many_rows);
BENCHMARK_CAPTURE(run_linear, gemm_f32, LinearPath::gemm, DType::f32)->Apply(many_rows);
BENCHMARK_CAPTURE(run_linear, onednn_f32, LinearPath::onednn, DType::f32)->Apply(many_rows);

}  // namespace

BENCHMARK_MAIN();
