// norm over the shapes of real models: bytes moved for each second, against the memory's bandwidth where many
// rows leave the caches, against call overhead where a decoding step has one.
#include <benchmark/benchmark.h>

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/random.h"
#include "krait/ops/norm.h"

namespace {

using krait::Context;
using krait::DType;
using krait::NormKind;
using krait::Tensor;

Tensor random_tensor(const krait::Dims& shape, DType dtype) {
  const Tensor t = Tensor::empty(shape);
  krait::Rng rng(1);
  for (float& value : t.span<float>()) value = rng.uniform() - 0.5F;
  return t.to(dtype);
}

void finish(benchmark::State& state, const Context& ctx, std::size_t bytes) {
  state.SetLabel(ctx.backend());
  state.counters["GB/s"] =
      benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate);
}

// What stands between two layers: residual += x, out = norm(residual).
void add_norm(benchmark::State& state, NormKind kind, DType dtype) {
  Context ctx;
  const krait::Dims shape{state.range(0), state.range(1)};
  const Tensor x = random_tensor(shape, dtype);
  const Tensor residual = random_tensor(shape, DType::f32);
  const Tensor weight = random_tensor({state.range(1)}, DType::f32);
  const Tensor out = Tensor::empty(shape, dtype);
  for ([[maybe_unused]] auto step : state)
    krait::norm(ctx, kind,
                {.x = x, .weight = weight, .residual = residual, .out = out, .residual_out = residual});
  finish(state, ctx, x.nbytes() + out.nbytes() + 2 * residual.nbytes());
}

// Mamba-2's norm(x * silu(z)).
void gated_norm(benchmark::State& state, DType dtype) {
  Context ctx;
  const krait::Dims shape{state.range(0), state.range(1)};
  const Tensor x = random_tensor(shape, dtype);
  const Tensor z = random_tensor(shape, dtype);
  const Tensor weight = random_tensor({state.range(1)}, DType::f32);
  const Tensor out = Tensor::empty(shape, dtype);
  for ([[maybe_unused]] auto step : state)
    krait::rms_norm(ctx, {.x = x, .weight = weight, .z = z, .norm_before_gate = false, .out = out});
  finish(state, ctx, 3 * x.nbytes());
}

// The backward of add_norm: the residual's gradient is carried along in place.
void add_norm_backward(benchmark::State& state, NormKind kind, DType dtype) {
  Context ctx;
  const krait::Dims shape{state.range(0), state.range(1)};
  const Tensor x = random_tensor(shape, DType::f32);
  const Tensor dout = random_tensor(shape, dtype);
  const Tensor weight = random_tensor({state.range(1)}, DType::f32);
  const Tensor dresidual = random_tensor(shape, DType::f32);
  const Tensor dweight = Tensor::zeros({state.range(1)});
  for ([[maybe_unused]] auto step : state)
    krait::norm_backward(ctx, kind,
                         {.x = x,
                          .weight = weight,
                          .dout = dout,
                          .dresidual = dresidual,
                          .dx = dresidual,
                          .dweight = dweight});
  finish(state, ctx, x.nbytes() + dout.nbytes() + 2 * dresidual.nbytes());
}

void gated_norm_backward(benchmark::State& state, DType dtype) {
  Context ctx;
  const krait::Dims shape{state.range(0), state.range(1)};
  const Tensor x = random_tensor(shape, dtype);
  const Tensor z = random_tensor(shape, dtype);
  const Tensor dout = random_tensor(shape, dtype);
  const Tensor weight = random_tensor({state.range(1)}, DType::f32);
  const Tensor dx = Tensor::empty(shape, dtype);
  const Tensor dz = Tensor::empty(shape, dtype);
  const Tensor dweight = Tensor::zeros({state.range(1)});
  for ([[maybe_unused]] auto step : state)
    krait::norm_backward(ctx, NormKind::rms,
                         {.x = x,
                          .weight = weight,
                          .z = z,
                          .norm_before_gate = false,
                          .dout = dout,
                          .dx = dx,
                          .dz = dz,
                          .dweight = dweight});
  finish(state, ctx, 5 * x.nbytes());
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"rows", "channels"})->UseRealTime()->MinTime(0.2);
  for (const std::int64_t rows : {1, 64, 8192}) b->Args({rows, 1536});
}

BENCHMARK_CAPTURE(add_norm, rms_f32, NormKind::rms, DType::f32)->Apply(shapes);
BENCHMARK_CAPTURE(add_norm, rms_bf16, NormKind::rms, DType::bf16)->Apply(shapes);
BENCHMARK_CAPTURE(add_norm, layer_f32, NormKind::layer, DType::f32)->Apply(shapes);
BENCHMARK_CAPTURE(gated_norm, f32, DType::f32)->Apply(shapes);
BENCHMARK_CAPTURE(gated_norm, bf16, DType::bf16)->Apply(shapes);
BENCHMARK_CAPTURE(add_norm_backward, rms_f32, NormKind::rms, DType::f32)->Apply(shapes);
BENCHMARK_CAPTURE(add_norm_backward, rms_bf16, NormKind::rms, DType::bf16)->Apply(shapes);
BENCHMARK_CAPTURE(add_norm_backward, layer_f32, NormKind::layer, DType::f32)->Apply(shapes);
BENCHMARK_CAPTURE(gated_norm_backward, f32, DType::f32)->Apply(shapes);
BENCHMARK_CAPTURE(gated_norm_backward, bf16, DType::bf16)->Apply(shapes);

}  // namespace
