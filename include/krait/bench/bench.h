// Measurements of whole models and of single operators, each beside what the machine can do at most, measured
// in the same run.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "krait/models/language_model.h"

namespace krait {

// What a context's device reaches: all threads of a CPU together.
struct Ceilings {
  // Summing a buffer larger than any cache; on a GPU copying one, bytes read and written counted.
  double read_bytes_per_second = 0.0;
  // f32 fused multiply-adds in registers, two FLOP each; on a GPU a large product of bf16 matrices.
  double flops_per_second = 0.0;
};
Ceilings measure_ceilings(Context& ctx);

// A model with random weights for measuring. Large ones are made in seconds: each layer is a copy of the
// first, in memory of its own.
LanguageModel random_model(Context& ctx, const ModelConfig& config, DType dtype);

struct ModelBenchOptions {
  std::int64_t prompt_length = 512;
  std::int64_t new_tokens = 64;
  std::int64_t batch = 1;
  std::int64_t repeat = 3;         // the median is reported
  DType state_dtype = DType::f32;  // of SSM states between steps
};

struct ModelBench {
  double prefill_tokens_per_second = 0.0;  // batch x prompt_length tokens, logits of the last ones only
  double decode_tokens_per_second = 0.0;   // batch x new_tokens tokens, one step at a time
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
  std::int64_t weight_bytes = 0;
  std::int64_t state_bytes = 0;        // of one sequence after the prompt
  std::int64_t peak_memory_bytes = 0;  // of the process, before the ceilings were measured
  // Bytes that a step cannot avoid reading or writing, over the time it took, over the read bandwidth.
  double decode_share_of_bandwidth = 0.0;
  // Products of the prompt in FLOP, over the time it took, over the peak.
  double prefill_share_of_flops = 0.0;
  Ceilings ceilings;
};
ModelBench bench_model(Context& ctx, LanguageModel& model, const ModelBenchOptions& options);

struct TrainBenchOptions {
  std::int64_t batch_size = 2;
  std::int64_t seq_len = 256;
  DType dtype = DType::f32;  // of products: f32 or bf16; master weights are f32
  Recompute recompute = Recompute::none;
  std::int64_t repeat = 3;  // steps, of which the median counts, after one that allocates and is not counted
};

struct TrainBench {
  double tokens_per_second = 0.0;
  double step_seconds = 0.0;
  std::int64_t parameters = 0;
  std::int64_t multiplied_parameters = 0;  // those of products, the head's included
  // 6 FLOP for each multiplied parameter and token, over the time of a step, over the peak. What a
  // recomputation adds does not count.
  double share_of_flops = 0.0;
  std::int64_t peak_memory_bytes = 0;  // of the process, before the ceilings were measured
  std::int64_t tape_bytes = 0;         // what forward kept for backward
  // Bytes of the tape by "module.tensor", largest first.
  std::vector<std::pair<std::string, std::size_t>> tape_parts;
  Ceilings ceilings;
};
// Whole steps of a Trainer on random tokens: forward, backward, clipping, AdamW. The model must have f32
// weights, which change.
TrainBench bench_training(Context& ctx, LanguageModel& model, const TrainBenchOptions& options);

struct OpBench {
  std::string name;
  std::string shape;  // with the defaults filled in
  std::string dtype;  // "f16", or "f16, state f32"
  std::string backend;
  double seconds = 0.0;  // median of `repeat` runs
  double bytes = 0.0;    // each input read and each output written once
  double flops = 0.0;
  Ceilings ceilings;
};
// The operators that bench_op knows, with the letters of their shapes and their defaults.
std::map<std::string, std::map<std::string, std::int64_t>> bench_ops();
// `state_dtype`: of the state of state_update, `dtype` where left out. Throws where the operator or a letter
// is unknown, naming the known ones.
OpBench bench_op(Context& ctx, const std::string& name, const std::map<std::string, std::int64_t>& shape,
                 DType dtype = DType::f32, std::int64_t repeat = 20, std::optional<DType> state_dtype = {});

// Bytes of memory that the process has held at most; on a GPU, those that the context's pool has.
std::int64_t peak_memory_bytes(const Context& ctx);

}  // namespace krait
