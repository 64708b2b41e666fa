// sample over the vocabulary of GPT-NeoX: the time of one token's choice. `spread` is the standard deviation
// of the logits: at 3 a few hundred tokens hold most of the mass, at 0.1 nearly all are alike.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "krait/core/random.h"
#include "krait/ops/sampling.h"

namespace {

void sample(benchmark::State& state, const krait::SamplingOptions& options, float spread) {
  constexpr std::int64_t kVocab = 50280;
  krait::Rng rng(1);
  std::vector<float> logits(kVocab);
  for (float& logit : logits) logit = spread * rng.normal();
  std::vector<std::int64_t> previous(1000);
  for (std::size_t i = 0; i < previous.size(); ++i) previous[i] = static_cast<std::int64_t>(i * 7);
  for ([[maybe_unused]] auto step : state)
    benchmark::DoNotOptimize(krait::sample(logits, kVocab, previous, options, rng));
}

BENCHMARK_CAPTURE(sample, argmax, krait::SamplingOptions{.top_k = 1}, 3.0F);
BENCHMARK_CAPTURE(sample, plain, krait::SamplingOptions{}, 3.0F);
BENCHMARK_CAPTURE(sample, temperature, krait::SamplingOptions{.temperature = 0.7}, 3.0F);
BENCHMARK_CAPTURE(sample, top_k, krait::SamplingOptions{.temperature = 0.7, .top_k = 40}, 3.0F);
BENCHMARK_CAPTURE(sample, top_k_top_p, krait::SamplingOptions{.temperature = 0.7, .top_k = 40, .top_p = 0.9},
                  3.0F);
BENCHMARK_CAPTURE(sample, top_p, krait::SamplingOptions{.temperature = 0.8, .top_p = 0.9}, 3.0F);
BENCHMARK_CAPTURE(sample, top_p_flat, krait::SamplingOptions{.top_p = 0.9}, 0.1F);
BENCHMARK_CAPTURE(sample, min_p, krait::SamplingOptions{.min_p = 0.05}, 3.0F);
BENCHMARK_CAPTURE(sample, penalty_top_p, krait::SamplingOptions{.top_p = 0.9, .repetition_penalty = 1.2},
                  3.0F);

}  // namespace
