#include "bench/timing.h"
#include "krait/bench/bench.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/train/trainer.h"

namespace krait {
namespace {

// One batch of random tokens, over and over.
class RandomBatch final : public Dataset {
 public:
  RandomBatch(std::int64_t rows, std::int64_t length, std::int64_t vocabulary) {
    Rng rng(1);
    for (Tensor* tokens : {&inputs_, &targets_}) {
      *tokens = Tensor::empty({rows, length}, DType::i64);
      for (std::int64_t& id : tokens->span<std::int64_t>())
        id = static_cast<std::int64_t>(rng.next_u32() % static_cast<std::uint64_t>(vocabulary));
    }
  }

  [[nodiscard]] std::int64_t seq_len() const override { return inputs_.size(1); }
  [[nodiscard]] std::int64_t batch_size() const override { return inputs_.size(0); }
  [[nodiscard]] std::int64_t tokens() const override { return inputs_.numel(); }
  [[nodiscard]] std::int64_t batches_per_epoch() const override { return 1; }
  void fill(std::int64_t /*index*/, TrainingBatch& batch) const override {
    batch.inputs = inputs_;
    batch.targets = targets_;
  }
  [[nodiscard]] bool restarts(std::int64_t /*index*/, std::int64_t /*row*/) const override { return true; }

 private:
  Tensor inputs_;
  Tensor targets_;
};

}  // namespace

TrainBench bench_training(Context& ctx, LanguageModel& model, const TrainBenchOptions& options) {
  require(options.batch_size >= 1 && options.seq_len >= 1 && options.repeat >= 1, "bench: batch size ",
          options.batch_size, ", sequence length ", options.seq_len, ", repeat ", options.repeat,
          ": expected at least 1 of each");
  require(options.dtype == DType::f32 || options.dtype == DType::bf16, "bench: dtype is ", options.dtype,
          ", expected f32 or bf16 for training");
  TrainBench result;
  model.visit([&](const Parameter& p) {
    result.parameters += p.tensor.numel();
    // A token reads one row of an embedding that is not the head too.
    const bool is_head = &p.tensor == &model.head_weight();
    if (p.kind == ParameterKind::matrix && (is_head || p.name.find("embed") == std::string::npos))
      result.multiplied_parameters += p.tensor.numel();
  });

  const RandomBatch data(options.batch_size, options.seq_len, model.config().vocab_size);
  const TrainSettings settings{.steps = options.repeat + 1,
                               .batch_size = options.batch_size,
                               .seq_len = options.seq_len,
                               .dtype = options.dtype,
                               .recompute = options.recompute};
  Trainer trainer(ctx, model, data, settings);
  trainer.step();
  std::vector<double> seconds;
  for (std::int64_t i = 0; i < options.repeat; ++i)
    seconds.push_back(seconds_of([&] {
      trainer.step();
      ctx.synchronize();
    }));
  result.step_seconds = median(seconds);
  result.peak_memory_bytes = peak_memory_bytes(ctx);
  result.tape_bytes = static_cast<std::int64_t>(trainer.tape().peak_bytes());
  result.tape_parts = trainer.tape().breakdown();
  result.ceilings = measure_ceilings(ctx);
  const auto tokens = static_cast<double>(data.tokens());
  result.tokens_per_second = tokens / result.step_seconds;
  result.share_of_flops = 6.0 * static_cast<double>(result.multiplied_parameters) * result.tokens_per_second /
                          result.ceilings.flops_per_second;
  return result;
}

}  // namespace krait
