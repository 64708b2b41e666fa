// The row operators of a GPU on the shapes of models, against the bytes that they have to move:
//   bench_gpu_rows [cuda:N]
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "gpu_timing.h"
#include "krait/core/context.h"
#include "krait/core/error.h"
#include "krait/ops/activation.h"
#include "krait/ops/cross_entropy.h"
#include "krait/ops/dropout.h"
#include "krait/ops/norm.h"
#include "krait/ops/optimizer.h"
#include "ops/norm/kernels.h"

namespace {

using namespace krait;

// The best of several runs, each of enough calls to hide the first one's way to the device.
void measure(Context& ctx, const std::string& what, double bytes, const std::function<void()>& run) {
  run();
  const double best = seconds_of_call(ctx, 5, 20, run);
  std::printf("%-44s %9.4f ms %8.0f GB/s\n", what.c_str(), best * 1e3, bytes / best * 1e-9);
}

Tensor filled(Context& ctx, const Dims& shape, DType dtype, double value) {
  Tensor t = ctx.empty(shape, dtype);
  ctx.fill(t, value);
  return t;
}

double bytes_of(const std::vector<Tensor>& tensors) {
  double bytes = 0.0;
  for (const Tensor& t : tensors) bytes += static_cast<double>(t.nbytes());
  return bytes;
}

// The same with other numbers of vectors for each thread.
void with_other_plans(Context& ctx, const norm_kernels::Problem& problem, double bytes) {
  for (const int vectors : {1, 2, 4}) {
    const auto warps = static_cast<int>((problem.channels / 8 + 32 * vectors - 1) / (32 * vectors));
    if (warps > norm_kernels::kMaxWarps) continue;
    measure(ctx, concat("  ", vectors, " vectors, ", warps, " warps"), bytes, [&] {
      norm_kernels::cuda(ctx, problem, {.vectors = vectors, .warps = warps, .groups = warps == 1 ? 4 : 1});
    });
  }
}

void gated_norm(Context& ctx, std::int64_t rows, std::int64_t channels) {
  const Dims shape{rows, channels};
  const Tensor x = filled(ctx, shape, DType::bf16, 0.5);
  const Tensor z = filled(ctx, shape, DType::bf16, 0.25);
  const Tensor out = filled(ctx, shape, DType::bf16, 0.0);
  const Tensor weight = filled(ctx, {channels}, DType::f32, 1.0);
  const double bytes = bytes_of({x, z, out});
  const std::string name = concat("gated rms_norm bf16 ", rows, " x ", channels);
  measure(ctx, name, bytes,
          [&] { rms_norm(ctx, {.x = x, .weight = weight, .z = z, .norm_before_gate = false, .out = out}); });
  norm_kernels::Problem problem;
  problem.rows = rows;
  problem.channels = problem.group_size = channels;
  problem.eps = 1e-5;
  problem.norm_before_gate = false;
  problem.x = norm_kernels::Rows(x);
  problem.z = norm_kernels::Rows(z);
  problem.weight = norm_kernels::Rows(weight);
  problem.out = norm_kernels::Rows(out);
  with_other_plans(ctx, problem, bytes);
  const Tensor dx = filled(ctx, shape, DType::bf16, 0.0);
  const Tensor dz = filled(ctx, shape, DType::bf16, 0.0);
  const Tensor dweight = ctx.zeros({channels});
  measure(ctx, concat(name, ", backward"), bytes_of({x, z, out, dx, dz}), [&] {
    norm_backward(ctx, NormKind::rms,
                  {.x = x,
                   .weight = weight,
                   .z = z,
                   .norm_before_gate = false,
                   .dout = out,
                   .dx = dx,
                   .dz = dz,
                   .dweight = dweight});
  });
}

// What stands between two layers: residual += x, out = norm(residual).
void residual_norm(Context& ctx, std::int64_t rows, std::int64_t channels) {
  const Dims shape{rows, channels};
  const Tensor x = filled(ctx, shape, DType::bf16, 0.5);
  const Tensor out = filled(ctx, shape, DType::bf16, 0.0);
  const Tensor residual = filled(ctx, shape, DType::f32, 0.25);
  const Tensor weight = filled(ctx, {channels}, DType::f32, 1.0);
  const Tensor dweight = ctx.zeros({channels});
  const Tensor dresidual = filled(ctx, shape, DType::f32, 0.25);
  const std::string name = concat("residual + rms_norm bf16/f32 ", rows, " x ", channels);
  measure(ctx, name, bytes_of({x, out, residual, residual}), [&] {
    rms_norm(ctx, {.x = x, .weight = weight, .residual = residual, .out = out, .residual_out = residual});
  });
  norm_kernels::Problem problem;
  problem.rows = rows;
  problem.channels = problem.group_size = channels;
  problem.eps = 1e-5;
  problem.x = norm_kernels::Rows(x);
  problem.residual = norm_kernels::Rows(residual);
  problem.weight = norm_kernels::Rows(weight);
  problem.out = norm_kernels::Rows(out);
  problem.residual_out = norm_kernels::Rows(residual);
  with_other_plans(ctx, problem, bytes_of({x, out, residual, residual}));
  measure(ctx, concat(name, ", backward"), bytes_of({residual, out, dresidual, dresidual}), [&] {
    norm_backward(ctx, NormKind::rms,
                  {.x = residual,
                   .weight = weight,
                   .dout = out,
                   .dresidual = dresidual,
                   .dx = dresidual,
                   .dweight = dweight});
  });
}

void elements(Context& ctx) {
  const Dims shape{32768, 3072};
  const Tensor x = filled(ctx, shape, DType::bf16, 0.5);
  const Tensor gate = filled(ctx, shape, DType::bf16, 0.25);
  const Tensor out = filled(ctx, shape, DType::bf16, 0.0);
  const Tensor other = filled(ctx, shape, DType::bf16, 0.0);
  measure(ctx, "gated_silu bf16 32768 x 3072", bytes_of({x, gate, out}),
          [&] { gated_silu(ctx, {.x = x, .gate = gate, .out = out}); });
  measure(ctx, "gated_silu bf16 32768 x 3072, backward", bytes_of({x, gate, out, out, other}),
          [&] { gated_silu_backward(ctx, {.x = x, .gate = gate, .dout = out, .dx = out, .dgate = other}); });
  measure(ctx, "gelu bf16 32768 x 3072", bytes_of({x, out}), [&] { gelu(ctx, {.x = x, .out = out}); });
  measure(ctx, "dropout bf16 32768 x 3072", bytes_of({x, out}),
          [&] { dropout(ctx, {.x = x, .probability = 0.1, .out = out}); });
}

void losses(Context& ctx) {
  const std::int64_t rows = 4096;
  const std::int64_t vocabulary = 50288;
  const Tensor logits = filled(ctx, {rows, vocabulary}, DType::f32, 0.5);
  const Tensor dlogits = filled(ctx, {rows, vocabulary}, DType::bf16, 0.0);
  const Tensor targets = filled(ctx, {rows}, DType::i64, 7.0);
  Tensor logsumexp;
  measure(ctx, "cross_entropy f32 4096 x 50288", bytes_of({logits}),
          [&] { logsumexp = cross_entropy(ctx, {.logits = logits, .targets = targets}).logsumexp; });
  measure(ctx, "cross_entropy f32 4096 x 50288, backward", bytes_of({logits, dlogits}), [&] {
    cross_entropy_backward(
        ctx, {.logits = logits, .targets = targets, .logsumexp = logsumexp, .dlogits = dlogits});
  });
}

// About the 130 million parameters of the smallest models, in the tensors of 24 layers.
void optimizer(Context& ctx) {
  std::vector<AdamWTensor> tensors;
  std::vector<Tensor> gradients;
  const auto add = [&](const Dims& shape, bool matrix) {
    AdamWTensor t{.parameter = filled(ctx, shape, DType::f32, 0.1),
                  .gradient = filled(ctx, shape, DType::f32, 0.01),
                  .m = ctx.zeros(shape),
                  .v = ctx.zeros(shape),
                  .decay = matrix};
    if (matrix) t.compute = ctx.zeros(shape, DType::bf16);
    gradients.push_back(t.gradient);
    tensors.push_back(t);
  };
  add({50288, 768}, true);
  for (int layer = 0; layer < 24; ++layer) {
    add({768}, false);
    add({3072, 768}, true);
    add({1536, 4}, false);
    add({1536}, false);
    add({80, 1536}, true);
    add({1536, 48}, true);
    add({1536, 16}, false);
    add({1536}, false);
    add({768, 1536}, true);
  }
  double bytes = 0.0;
  std::int64_t parameters = 0;
  for (const AdamWTensor& t : tensors) {
    bytes += 7.0 * static_cast<double>(t.parameter.nbytes());
    if (t.compute) bytes += static_cast<double>(t.compute.nbytes());
    parameters += t.parameter.numel();
  }
  measure(ctx, concat("adamw, ", parameters, " parameters"), bytes,
          [&] { adamw(ctx, {.tensors = tensors, .weight_decay = 0.1}); });
  measure(ctx, concat("global_norm, ", parameters, " parameters"), bytes_of(gradients),
          [&] { global_norm(ctx, gradients); });
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Context ctx({.device = parse_device(argc > 1 ? argv[1] : "cuda")});
    const std::int64_t floats = std::int64_t{1} << 28;
    const Tensor from = filled(ctx, {floats}, DType::f32, 1.0);
    const Tensor to = filled(ctx, {floats}, DType::f32, 0.0);
    measure(ctx, "copy of 1 GiB", bytes_of({from, to}), [&] { ctx.copy(from, to); });
    gated_norm(ctx, 32768, 5120);
    gated_norm(ctx, 32768, 4096);
    gated_norm(ctx, 32768, 3072);
    gated_norm(ctx, 32768, 1536);
    gated_norm(ctx, 64, 5120);
    residual_norm(ctx, 32768, 2560);
    residual_norm(ctx, 32768, 768);
    elements(ctx);
    losses(ctx);
    optimizer(ctx);
    return 0;
  } catch (const Error& e) {
    std::fprintf(stderr, "bench_gpu_rows: %s\n", e.what());
    return 1;
  }
}
