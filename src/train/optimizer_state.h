// The optimizer's side of a model: f32 master weights, AdamW's moments, the moving average, and the gradients
// of all parameters as one list.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "krait/core/context.h"
#include "krait/io/tensor_file.h"
#include "krait/models/language_model.h"
#include "krait/ops/optimizer.h"
#include "krait/train/settings.h"

namespace krait {

class OptimizerState {
 public:
  // Takes the model's weights, which must be f32, as master weights; with dtype bf16 the model gets bf16
  // copies of its matrices in their place. The model has gradients from here on.
  OptimizerState(Context& ctx, LanguageModel& model, const TrainSettings& settings);

  [[nodiscard]] double gradient_norm() const;
  // One AdamW step; `update` counts from 1. Then the moving average.
  void update(std::int64_t update, double lr, double gradient_scale);

  // Master weights by name, and everything else that a checkpoint holds, on the host; on the CPU the tensors
  // are not copied.
  [[nodiscard]] io::TensorMap weights() const;
  [[nodiscard]] io::TensorMap average() const;  // empty without one
  [[nodiscard]] io::TensorMap moments() const;
  // Throws Error naming tensor and `name` where one is missing, left over, or has another shape.
  void load(const io::TensorMap& weights, const io::TensorMap& moments, const std::string& name);

  [[nodiscard]] std::int64_t parameters() const;
  [[nodiscard]] std::int64_t decayed_parameters() const;

 private:
  friend class WeightsForEvaluation;

  Context& ctx_;
  LanguageModel& model_;
  TrainSettings settings_;
  std::vector<std::string> names_;
  std::vector<AdamWTensor> tensors_;
  std::vector<Tensor> gradients_;
  std::vector<AveragedTensor> averages_;  // empty without a moving average
};

// While it lives, the model computes with its f32 master weights, or with their average: what the run will
// leave behind.
class WeightsForEvaluation {
 public:
  enum class Which : std::uint8_t { master, average };
  WeightsForEvaluation(OptimizerState& state, Which which);
  ~WeightsForEvaluation();
  WeightsForEvaluation(const WeightsForEvaluation&) = delete;
  WeightsForEvaluation& operator=(const WeightsForEvaluation&) = delete;

 private:
  void swap();

  Context& ctx_;
  LanguageModel& model_;
  std::vector<Tensor> others_;  // in the order of visit(); absent: not trained, and left as it is
};

}  // namespace krait
