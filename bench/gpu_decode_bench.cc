// A token of one sequence through a whole model in one kernel (decode_step), recorded: microseconds a step,
// and the bytes that it cannot do without over that time. Weights are small random numbers.
//   bench_gpu_decode [cuda:N [NAME...]]
#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "gpu_timing.h"
#include "krait/core/context.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/ops/decode_step.h"

namespace {

using namespace krait;

constexpr DType kHalf = DType::f16;

struct Sizes {
  const char* name;
  std::int64_t layers;
  std::int64_t d_model;
  bool mamba2;
};

// Pieces of one block of random numbers: what matters is that no two layers read the same memory.
class Source {
 public:
  explicit Source(Context& ctx) : ctx_(ctx) {
    const Tensor host = Tensor::empty({1 << 20});
    Rng rng(1);
    for (float& v : host.span<float>()) v = 0.02F * rng.normal();
    noise_ = ctx.to_device(host.to(kHalf));
  }
  Tensor matrix(std::int64_t rows, std::int64_t columns) {
    const Tensor t = ctx_.empty({rows, columns}, kHalf);
    const Tensor flat = t.view({-1});
    for (std::int64_t at = 0; at < flat.size(0); at += noise_.size(0)) {
      const std::int64_t count = std::min(noise_.size(0), flat.size(0) - at);
      ctx_.copy(noise_.slice(0, 0, count), flat.slice(0, at, at + count));
    }
    bytes += static_cast<std::int64_t>(t.nbytes());
    return t;
  }
  Tensor floats(const Dims& shape, double value) {
    const Tensor t = ctx_.empty(shape);
    ctx_.fill(t, value);
    bytes += static_cast<std::int64_t>(t.nbytes());
    return t;
  }
  std::int64_t bytes = 0;

 private:
  Context& ctx_;
  Tensor noise_;
};

void measure(Context& ctx, const Sizes& s) {
  constexpr std::int64_t kVocabulary = 50288;
  Source source(ctx);
  const std::int64_t d_inner = 2 * s.d_model;
  const std::int64_t heads = s.mamba2 ? d_inner / 64 : 0;
  const std::int64_t d_state = s.mamba2 ? 128 : 16;
  const std::int64_t channels = s.mamba2 ? d_inner + 2 * d_state : d_inner;
  const std::int64_t rank = s.mamba2 ? 0 : s.d_model / 16;
  DecodeStepArgs args{.id = ctx.zeros({1}, DType::i64),
                      .row = ctx.zeros({1}, DType::i64),
                      .embedding = source.matrix(kVocabulary, s.d_model),
                      .norm_weight = source.floats({s.d_model}, 1.0),
                      .logits = ctx.empty({1, kVocabulary})};
  args.head = args.embedding;
  args.model.sizes = {.mamba2 = s.mamba2,
                      .layers = s.layers,
                      .d_model = s.d_model,
                      .d_inner = d_inner,
                      .d_state = d_state,
                      .heads = heads,
                      .dt_rank = rank,
                      .vocabulary = kVocabulary};
  args.model.options.gated_norm = s.mamba2;
  for (std::int64_t l = 0; l < s.layers; ++l) {
    DecodeLayer layer{
        .norm_weight = source.floats({s.d_model}, 1.0),
        .in_weight = source.matrix(d_inner + (s.mamba2 ? channels + heads : d_inner), s.d_model),
        .conv_weight = source.floats({channels, 4}, 0.3),
        .conv_bias = source.floats({channels}, 0.01),
        .conv_state = source.floats({1, 3, channels}, 0.0).transpose(1, 2),
        .dt_bias = source.floats({s.mamba2 ? heads : d_inner}, -4.0),
        .A = source.floats(s.mamba2 ? Dims{heads} : Dims{d_inner, d_state}, -1.0),
        .D = source.floats({s.mamba2 ? heads : d_inner}, 1.0),
        .ssm_state = s.mamba2 ? source.floats({1, heads, 64, d_state}, 0.0)
                              : source.floats({1, d_inner, d_state}, 0.0),
        .out_weight = source.matrix(s.d_model, d_inner)};
    source.bytes += static_cast<std::int64_t>(layer.ssm_state.nbytes());  // read and written
    if (s.mamba2) {
      layer.gated_norm_weight = source.floats({d_inner}, 1.0);
    } else {
      layer.x_weight = source.matrix(rank + 2 * d_state, d_inner);
      layer.dt_weight = source.matrix(d_inner, rank);
    }
    args.model.layers.push_back(layer);
  }
  const auto step = [&] { require(decode_step(ctx, args), s.name, " is not for decode_step on this GPU"); };
  step();
  const auto graph = ctx.record(step);
  const double best = seconds_of_call(ctx, 5, 20, graph);
  std::printf("%-12s %8.1f us a step, %6.2f a layer, %5.2f TB/s\n", s.name, 1e6 * best,
              1e6 * best / static_cast<double>(s.layers), 1e-12 * static_cast<double>(source.bytes) / best);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Context ctx(ContextOptions{.device = parse_device(argc > 1 ? argv[1] : "cuda")});
    for (const Sizes& s : {Sizes{"mamba-130m", 24, 768, false}, Sizes{"mamba2-130m", 24, 768, true},
                           Sizes{"mamba-2.8b", 64, 2560, false}, Sizes{"mamba2-2.7b", 64, 2560, true}}) {
      const bool wanted = std::any_of(argv + std::min(argc, 2), argv + argc,
                                      [&](const char* name) { return name == std::string(s.name); });
      if (argc <= 2 || wanted) measure(ctx, s);
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
