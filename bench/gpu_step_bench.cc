// The kernels of a decoding step on a GPU, one sequence: microseconds of a layer and of its parts alone, each
// with and without the overlap of a kernel with the one in front. Every line is a recorded chain over layers
// of weights of their own.
//   bench_gpu_step [cuda:N]
#include <cstdio>
#include <exception>
#include <functional>
#include <optional>
#include <vector>

#include "gpu_timing.h"
#include "krait/core/context.h"
#include "krait/ops/linear.h"
#include "krait/ops/projection.h"
#include "krait/ops/selective_step.h"
#include "krait/ops/state_update.h"

namespace {

using namespace krait;

constexpr std::int64_t kRowsOfState = 1;

// Seconds of a launch of what `work` queues, the best of a few.
double seconds_of(Context& ctx, bool overlaps, const std::function<void()>& work) {
  const auto run = [&] {
    std::optional<OverlappingKernels> overlap;
    if (overlaps) overlap.emplace(ctx);
    work();
  };
  run();
  const auto graph = ctx.record(run);
  return seconds_of_call(ctx, 5, 10, graph);
}

Tensor filled(Context& ctx, const Dims& shape, DType dtype, double value = 0.01) {
  const Tensor t = ctx.empty(shape, dtype);
  ctx.fill(t, value);
  return t;
}

struct Layer {
  Tensor in;
  Tensor x;
  Tensor dt;
  Tensor out;
  Tensor norm;
  Tensor gated_norm;
  Tensor taps;
  Tensor window;
  Tensor state;
  Tensor A;
};

struct Sizes {
  const char* name;
  std::int64_t layers;
  std::int64_t d_model;
  bool mamba2;
  std::int64_t d_inner() const { return 2 * d_model; }
  std::int64_t conv() const { return mamba2 ? d_inner() + 256 : d_inner(); }
  std::int64_t heads() const { return d_inner() / 64; }
  std::int64_t in() const { return mamba2 ? d_inner() + conv() + heads() : 2 * d_inner(); }
  std::int64_t rank() const { return d_model / 16; }
};

enum Part : unsigned { kIn = 1, kX = 2, kState = 4, kOut = 8, kAll = 15 };

void measure(Context& ctx, const Sizes& s) {
  constexpr DType kHalf = DType::f16;
  std::vector<Layer> layers;
  for (std::int64_t i = 0; i < s.layers; ++i) {
    Layer layer{.in = filled(ctx, {s.in(), s.d_model}, kHalf),
                .out = filled(ctx, {s.d_model, s.d_inner()}, kHalf),
                .norm = filled(ctx, {s.d_model}, DType::f32, 1),
                .gated_norm = filled(ctx, {s.d_inner()}, DType::f32, 1),
                .taps = filled(ctx, {s.conv(), 4}, DType::f32),
                .window = filled(ctx, {kRowsOfState, 3, s.conv()}, DType::f32).transpose(1, 2)};
    if (s.mamba2) {
      layer.state = filled(ctx, {kRowsOfState, s.heads(), 64, 128}, DType::f32);
      layer.A = filled(ctx, {s.heads()}, DType::f32, -1);
    } else {
      layer.x = filled(ctx, {s.rank() + 32, s.d_inner()}, kHalf);
      layer.dt = filled(ctx, {s.d_inner(), s.rank()}, kHalf);
      layer.state = filled(ctx, {kRowsOfState, s.d_inner(), 16}, DType::f32);
      layer.A = filled(ctx, {s.d_inner(), 16}, DType::f32, -1);
    }
    layers.push_back(layer);
  }
  const Tensor indices = ctx.to_device(Tensor::from(std::vector<std::int64_t>{0}));
  const Tensor embedded = filled(ctx, {1, s.d_model}, kHalf);
  const Tensor first = filled(ctx, {1, s.in()}, kHalf);
  const Tensor convolved = filled(ctx, {1, s.conv()}, kHalf);
  const Tensor low = filled(ctx, {1, s.rank() + 32}, kHalf);
  const Tensor D = filled(ctx, {s.d_inner()}, DType::f32);

  const auto chain = [&](unsigned parts) {
    Tensor hidden = embedded;
    Tensor residual;
    for (const Layer& layer : layers) {
      ProjectionResult in{.out = first, .convolved = convolved};
      if ((parts & kIn) != 0) {
        in = projection(ctx, {.x = hidden,
                              .input = {.norm = ProjectionNorm::rms,
                                        .weight = layer.norm,
                                        .residual = residual,
                                        .return_residual = true},
                              .weight = layer.in,
                              .conv = {.conv_state = layer.window,
                                       .weight = layer.taps,
                                       .bias = layer.taps.view({-1}).slice(0, 0, s.conv()),
                                       .conv_state_indices = indices,
                                       .first = s.mamba2 ? s.d_inner() : 0}});
        residual = in.residual;
      }
      const Tensor x = in.convolved.slice(1, 0, s.d_inner());
      const Tensor z = in.out.slice(1, s.mamba2 ? 0 : s.d_inner(), s.mamba2 ? s.d_inner() : 2 * s.d_inner());
      Tensor y = x;
      if (s.mamba2) {
        const auto columns = [&](std::int64_t from) {
          return in.convolved.slice(1, s.d_inner() + from, s.d_inner() + from + 128).view({1, 1, 128});
        };
        if ((parts & kState) != 0)
          y = state_update(ctx, {.state = layer.state,
                                 .x = x.view({1, s.heads(), 64}),
                                 .dt = in.out.slice(1, s.in() - s.heads(), s.in()),
                                 .A = layer.A,
                                 .B = columns(0),
                                 .C = columns(128),
                                 .D = D.slice(0, 0, s.heads()),
                                 .dt_bias = D.slice(0, 0, s.heads()),
                                 .state_batch_indices = indices,
                                 .dt_softplus = true})
                  .view({1, s.d_inner()});
        if ((parts & kOut) != 0)
          hidden = projection(ctx, {.x = y,
                                    .input = {.norm = ProjectionNorm::rms,
                                              .weight = layer.gated_norm,
                                              .z = z,
                                              .norm_before_gate = false},
                                    .weight = layer.out})
                       .out;
      } else {
        Tensor projected = low;
        if ((parts & kX) != 0) projected = linear(ctx, {.x = x, .weight = layer.x});
        const auto columns = [&](std::int64_t from, std::int64_t count) {
          return projected.slice(1, from, from + count);
        };
        if ((parts & kState) != 0)
          y = selective_step(ctx, {.state = layer.state,
                                   .x = x,
                                   .low_dt = columns(0, s.rank()),
                                   .dt_weight = layer.dt,
                                   .dt_bias = D,
                                   .A = layer.A,
                                   .B = columns(s.rank(), 16),
                                   .C = columns(s.rank() + 16, 16),
                                   .D = D,
                                   .z = z,
                                   .state_batch_indices = indices});
        if ((parts & kOut) != 0) hidden = linear(ctx, {.x = y, .weight = layer.out});
      }
    }
  };
  const auto line = [&](const char* what, unsigned parts) {
    const auto each = [&](bool overlaps) {
      return 1e6 * seconds_of(ctx, overlaps, [&] { chain(parts); }) / static_cast<double>(s.layers);
    };
    std::printf("%-12s %-28s %7.2f us a layer, %7.2f us without overlap\n", s.name, what, each(true),
                each(false));
  };
  line("norm, in_proj, conv", kIn);
  if (!s.mamba2) line("x_proj", kX);
  line(s.mamba2 ? "state_update" : "dt_proj and step", kState);
  line(s.mamba2 ? "gated norm, out_proj" : "out_proj", kOut);
  line("all but the first", kAll - kIn);
  line("all but the state", kAll - kState);
  line("all", kAll);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Context ctx(ContextOptions{.device = parse_device(argc > 1 ? argv[1] : "cuda")});
    for (const Sizes& s : {Sizes{"mamba2-130m", 24, 768, true}, Sizes{"mamba-130m", 24, 768, false},
                           Sizes{"mamba2-2.7b", 16, 2560, true}, Sizes{"mamba-2.8b", 16, 2560, false}})
      measure(ctx, s);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
