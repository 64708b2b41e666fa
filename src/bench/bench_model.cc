#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <numeric>

#include "bench/ceilings.h"
#include "bench/timing.h"
#include "core/parallel.h"
#include "krait/bench/bench.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/models/stepper.h"
#include "krait/ops/linear.h"

namespace krait {

std::int64_t peak_memory_bytes(const Context& ctx) {
  // Its pool gives nothing back meanwhile.
  if (ctx.on_gpu()) return static_cast<std::int64_t>(ctx.pool_bytes());
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::int64_t>(usage.ru_maxrss) * 1024;
}

namespace {

// Copies on the device, read and written bytes counted, and products of large bf16 matrices.
Ceilings measure_gpu_ceilings(Context& ctx) {
  constexpr int kRepeats = 5;
  constexpr int kRuns = 8;
  Ceilings best;
  const auto best_of = [&](const auto& run) {
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kRepeats; ++i)
      least = std::min(least, seconds_of([&] {
                                for (int j = 0; j < kRuns; ++j) run();
                                ctx.synchronize();
                              }) / kRuns);
    return least;
  };
  {
    const Tensor from = ctx.zeros({std::int64_t{1} << 28});  // 1 GiB
    const Tensor to = ctx.zeros(from.shape());
    ctx.synchronize();
    best.read_bytes_per_second =
        2.0 * static_cast<double>(from.nbytes()) / best_of([&] { ctx.copy(from, to); });
  }
  constexpr std::int64_t kSize = 8192;
  Rng rng(1);
  const Tensor numbers = Tensor::empty({kSize, kSize});
  for (float& value : numbers.span<float>()) value = rng.uniform() - 0.5F;
  const Tensor a = ctx.to(ctx.to_device(numbers), DType::bf16);
  const Tensor out = ctx.empty(a.shape(), DType::bf16);
  ctx.synchronize();
  best.flops_per_second = 2.0 * static_cast<double>(kSize * kSize * kSize) /
                          best_of([&] { linear(ctx, {.x = a, .weight = a, .out = out}); });
  ctx.trim();
  return best;
}

}  // namespace

Ceilings measure_ceilings(Context& ctx) {
  if (ctx.on_gpu()) return measure_gpu_ceilings(ctx);
  constexpr std::int64_t kFloats = std::int64_t{32} << 20;  // 128 MB
  constexpr int kRepeats = 5;
  const Tensor buffer = Tensor::zeros({kFloats});
  std::vector<float> sinks(static_cast<std::size_t>(ctx.threads()) * 16);
  Ceilings best;
  for (int i = 0; i < kRepeats; ++i) {
    const double read = seconds_of([&] {
      parallel_for(ctx, ctx.threads(), 1, [&](std::int64_t t, std::int64_t) {
        const std::int64_t begin = kFloats * t / ctx.threads();
        const std::int64_t end = kFloats * (t + 1) / ctx.threads();
        sinks[static_cast<std::size_t>(t) * 16] = sum_floats(buffer.data<float>() + begin, end - begin);
      });
    });
    best.read_bytes_per_second =
        std::max(best.read_bytes_per_second, 4.0 * static_cast<double>(kFloats) / read);
    std::vector<double> flops(static_cast<std::size_t>(ctx.threads()) * 16);
    const double compute = seconds_of([&] {
      parallel_for(ctx, ctx.threads(), 1, [&](std::int64_t begin, std::int64_t) {
        const auto at = static_cast<std::size_t>(begin) * 16;
        flops[at] = multiply_add(std::int64_t{4} << 20, &sinks[at]);
      });
    });
    best.flops_per_second =
        std::max(best.flops_per_second, std::accumulate(flops.begin(), flops.end(), 0.0) / compute);
  }
  return best;
}

LanguageModel random_model(Context& ctx, const ModelConfig& config, DType dtype) {
  ModelConfig one = config;
  // Layers of several kinds are not copies of one another.
  const bool equal_layers = config.attn_layer_idx.empty() && config.n_layer > 1;
  if (equal_layers) one.n_layer = 1;
  LanguageModel first(one);
  first.initialize(/*seed=*/0, dtype);
  if (!equal_layers) {
    first.to_device(ctx);
    return first;
  }
  std::map<std::string, Tensor> tensors;
  first.visit([&](const Parameter& p) { tensors[p.name] = ctx.to_device(p.tensor); });
  LanguageModel model(config);
  model.visit([&](const Parameter& p) {
    std::string name = p.name;
    constexpr std::string_view kLayers = "layers.";
    const std::size_t at = name.find(kLayers);
    if (at != std::string::npos) {
      const std::size_t number = at + kLayers.size();
      name.replace(number, name.find('.', number) - number, "0");
    }
    p.tensor = ctx.clone(tensors.at(name));
  });
  model.to_device(ctx);
  return model;
}

ModelBench bench_model(Context& ctx, LanguageModel& model, const ModelBenchOptions& options) {
  require(options.prompt_length >= 1 && options.new_tokens >= 0 && options.batch >= 1 && options.repeat >= 1,
          "bench: prompt length ", options.prompt_length, ", new tokens ", options.new_tokens, ", batch ",
          options.batch, ", repeat ", options.repeat, ": expected at least 1 of each (new tokens: 0)");
  ModelBench result;
  double products = 0.0;  // multiply-adds of one token in the layers
  model.visit([&](const Parameter& p) {
    result.weight_bytes += static_cast<std::int64_t>(p.tensor.nbytes());
    if (p.kind == ParameterKind::matrix && &p.tensor != &model.head_weight())
      products += static_cast<double>(p.tensor.numel());
  });
  if (!model.config().tie_embeddings)  // the embedding, of which a token reads one row
    products -= static_cast<double>(model.head_weight().numel());

  Rng rng(1);
  std::vector<std::vector<std::int64_t>> prompts(static_cast<std::size_t>(options.batch));
  for (auto& prompt : prompts)
    for (std::int64_t i = 0; i < options.prompt_length; ++i)
      prompt.push_back(
          static_cast<std::int64_t>(rng.next_u32() % static_cast<std::uint64_t>(model.config().vocab_size)));
  const auto pool = model.make_pool(options.batch, options.state_dtype);
  std::vector<State> states;
  std::vector<Sequence> inputs;
  states.reserve(prompts.size());
  for (const auto& prompt : prompts) inputs.push_back({.ids = prompt, .state = &states.emplace_back(pool)});

  const std::vector<std::int64_t> next(states.size(), 0);
  std::vector<State*> stepped;
  for (State& state : states) stepped.push_back(&state);
  Stepper stepper(ctx, model);

  std::vector<double> prefill;
  std::vector<double> decode;
  for (std::int64_t r = 0; r < options.repeat; ++r) {
    for (State& state : states) state.reset();
    prefill.push_back(seconds_of([&] {
      (void)model.logits(ctx, inputs);
      ctx.synchronize();
    }));
    result.state_bytes = static_cast<std::int64_t>(states[0].nbytes());
    decode.push_back(seconds_of([&] {
      for (std::int64_t i = 0; i < options.new_tokens; ++i) (void)stepper.step(next, stepped);
      ctx.synchronize();
    }));
  }
  result.prefill_seconds = median(prefill);
  result.decode_seconds = median(decode);
  const auto batch = static_cast<double>(options.batch);
  const double prompt_tokens = batch * static_cast<double>(options.prompt_length);
  result.prefill_tokens_per_second = prompt_tokens / result.prefill_seconds;
  result.peak_memory_bytes = peak_memory_bytes(ctx);
  result.ceilings = measure_ceilings(ctx);
  if (options.new_tokens > 0) {
    const double steps = static_cast<double>(options.new_tokens);
    result.decode_tokens_per_second = batch * steps / result.decode_seconds;
    const double bytes =
        static_cast<double>(result.weight_bytes) + 2.0 * batch * static_cast<double>(result.state_bytes);
    result.decode_share_of_bandwidth =
        bytes * steps / result.decode_seconds / result.ceilings.read_bytes_per_second;
  }
  result.prefill_share_of_flops =
      2.0 * products * prompt_tokens / result.prefill_seconds / result.ceilings.flops_per_second;
  return result;
}

}  // namespace krait
