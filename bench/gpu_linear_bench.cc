// linear and attention on a GPU: bytes of weight a second where few rows meet the weights and floating-point
// operations a second where many do, beside a copy of the device; and steps of decoding with attention. Each
// line is recorded as a graph of many calls, so that no launch on the host is measured.
//   bench_gpu_linear [cuda:N]
#include <algorithm>
#include <cstdio>
#include <exception>
#include <functional>
#include <vector>

#include "gpu_timing.h"
#include "krait/core/context.h"
#include "krait/core/dtype.h"
#include "krait/ops/attention.h"
#include "krait/ops/linear.h"

namespace {

using namespace krait;

// Seconds of one call among `calls` in a graph, the best of a few launches of it.
double seconds_of(Context& ctx, int calls, const std::function<void(int)>& call) {
  call(0);
  const auto graph = ctx.record([&] {
    for (int i = 0; i < calls; ++i) call(i);
  });
  return seconds_of_call(ctx, 4, 1, graph) / calls;
}

Tensor filled(Context& ctx, const Dims& shape, DType dtype) {
  const Tensor t = ctx.empty(shape, dtype);
  ctx.fill(t, 0.25);
  return t;
}

void copy(Context& ctx) {
  const Tensor from = filled(ctx, {1 << 29}, DType::bf16);
  const Tensor to = ctx.empty(from.shape(), DType::bf16);
  const double seconds = seconds_of(ctx, 8, [&](int) { ctx.copy(from, to); });
  std::printf("copy                                 %8.0f GB/s read and written\n",
              2e-9 * static_cast<double>(from.nbytes()) / seconds);
}

void few_rows(Context& ctx, std::int64_t rows, std::int64_t out, std::int64_t in, DType x_dtype, DType dtype,
              LinearPath path) {
  // Weights in turn, more than the caches hold.
  const std::int64_t bytes = out * in * static_cast<std::int64_t>(size_of(dtype));
  const std::int64_t layers = 400'000'000 / bytes + 1;
  const Tensor weights = filled(ctx, {layers, out, in}, dtype);
  const Tensor x = filled(ctx, {rows, in}, x_dtype);
  const Tensor y = ctx.empty({rows, out});
  const int calls = static_cast<int>(std::max<std::int64_t>(layers, 64));
  const double seconds = seconds_of(ctx, calls, [&](int i) {
    linear(ctx, {.x = x, .weight = weights.select(0, i % layers), .out = y, .path = path});
  });
  std::printf("%2ld rows  %6ld x %-5ld %-4s x %-4s  %-9s %8.0f GB/s  %7.2f us\n", static_cast<long>(rows),
              static_cast<long>(out), static_cast<long>(in), name_of(dtype).data(), name_of(x_dtype).data(),
              path == LinearPath::gemv ? "gemv" : "cublaslt", 1e-9 * static_cast<double>(bytes) / seconds,
              1e6 * seconds);
}

void many_rows(Context& ctx, std::int64_t rows, std::int64_t out, std::int64_t in, DType dtype) {
  const Tensor weight = filled(ctx, {out, in}, dtype);
  const Tensor x = filled(ctx, {rows, in}, dtype);
  const Tensor y = ctx.empty({rows, out}, dtype);
  const double seconds = seconds_of(ctx, 10, [&](int) { linear(ctx, {.x = x, .weight = weight, .out = y}); });
  std::printf(
      "%5ld rows %6ld x %-5ld %-4s           %8.1f TFLOP/s  %7.3f ms\n", static_cast<long>(rows),
      static_cast<long>(out), static_cast<long>(in), name_of(dtype).data(),
      2e-12 * static_cast<double>(rows) * static_cast<double>(out) * static_cast<double>(in) / seconds,
      1e3 * seconds);
}

void decode(Context& ctx, std::int64_t keys, std::int64_t heads, std::int64_t heads_kv, DType dtype) {
  const Tensor q = filled(ctx, {1, heads, 64}, DType::f32);
  const Tensor k = filled(ctx, {keys, heads_kv, 64}, dtype);
  const Tensor v = filled(ctx, {keys, heads_kv, 64}, dtype);
  const Tensor out = ctx.empty({1, heads, 64});
  const double seconds =
      seconds_of(ctx, 30, [&](int) { attention(ctx, {.q = q, .k = k, .v = v, .causal = true, .out = out}); });
  std::printf("attention step, %6ld keys, %2ld over %2ld heads, %-4s %6.0f GB/s  %7.2f us\n",
              static_cast<long>(keys), static_cast<long>(heads), static_cast<long>(heads_kv),
              name_of(dtype).data(), 2e-9 * static_cast<double>(k.nbytes()) / seconds, 1e6 * seconds);
}

void prefill(Context& ctx, std::int64_t length, std::int64_t heads, DType dtype, bool backward) {
  const Dims shape{length, heads, 64};
  const Tensor q = filled(ctx, shape, dtype);
  const Tensor k = filled(ctx, shape, dtype);
  const Tensor v = filled(ctx, shape, dtype);
  const Tensor out = ctx.empty(shape, dtype);
  const Tensor sums = ctx.empty({length, heads});
  const Tensor dq = ctx.empty(shape, dtype);
  const Tensor dk = ctx.empty(shape, dtype);
  const Tensor dv = ctx.empty(shape, dtype);
  attention(ctx, {.q = q, .k = k, .v = v, .causal = true, .out = out, .logsumexp = sums});
  const double seconds = seconds_of(ctx, 3, [&](int) {
    if (backward)
      attention_backward(ctx, {.q = q,
                               .k = k,
                               .v = v,
                               .causal = true,
                               .out = out,
                               .logsumexp = sums,
                               .dout = out,
                               .dq = dq,
                               .dk = dk,
                               .dv = dv});
    else
      attention(ctx, {.q = q, .k = k, .v = v, .causal = true, .out = out});
  });
  // Two products of the forward, five of the backward, over the pairs that the mask leaves.
  const double pairs = 0.5 * static_cast<double>(length) * static_cast<double>(length);
  std::printf("attention %-8s L %5ld, %2ld heads of 64, %-4s     %6.1f TFLOP/s  %7.3f ms\n",
              backward ? "backward" : "prefill", static_cast<long>(length), static_cast<long>(heads),
              name_of(dtype).data(),
              1e-12 * (backward ? 10.0 : 4.0) * pairs * 64.0 * static_cast<double>(heads) / seconds,
              1e3 * seconds);
}

void run(const char* device) {
  Context ctx(ContextOptions{.device = parse_device(device)});
  copy(ctx);
  constexpr DType kShort = DType::bf16;
  for (const auto& [out, in] : {std::pair<std::int64_t, std::int64_t>{50280, 768},
                                {3352, 768},
                                {3072, 768},
                                {768, 1536},
                                {1536, 48},
                                {10576, 2560},
                                {2560, 5120},
                                {50280, 2560}})
    for (const std::int64_t rows : {1, 2, 4, 8, 16})
      few_rows(ctx, rows, out, in, DType::f32, kShort, LinearPath::gemv);
  for (const std::int64_t rows : {1, 8, 16, 32, 64, 128})
    few_rows(ctx, rows, 10576, 2560, kShort, kShort, LinearPath::cublaslt);
  few_rows(ctx, 1, 50280, 768, DType::f32, DType::f32, LinearPath::gemv);
  few_rows(ctx, 1, 10576, 2560, DType::f32, DType::f16, LinearPath::gemv);
  many_rows(ctx, 8192, 8192, 8192, kShort);
  many_rows(ctx, 32768, 3352, 768, kShort);
  many_rows(ctx, 2048, 10576, 2560, DType::f16);
  many_rows(ctx, 4096, 4096, 4096, DType::f32);
  decode(ctx, 4096, 12, 12, kShort);
  decode(ctx, 32768, 12, 12, kShort);
  decode(ctx, 32768, 32, 8, kShort);
  prefill(ctx, 4096, 12, kShort, false);
  prefill(ctx, 4096, 12, kShort, true);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc > 1 ? argv[1] : "cuda");
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_gpu_linear: %s\n", e.what());
    return 1;
  }
}
