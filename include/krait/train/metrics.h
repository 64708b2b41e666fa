// What a training run reports, and how it is written down: one JSON object a line, the same in metrics.jsonl
// and samples.jsonl and for programs that read standard output.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace krait {

// One optimizer step.
struct StepReport {
  std::int64_t step = 0;   // from 1
  double loss = 0.0;       // mean over the targets of the step, in nats
  double grad_norm = 0.0;  // of all gradients together, before clipping
  double lr = 0.0;
  std::int64_t tokens = 0;  // targets learnt from since the beginning of the run
  double seconds = 0.0;     // since the beginning of the run, evaluations and earlier processes included
  double tokens_per_second = 0.0;  // of this step; in metrics.jsonl: of all since the line before
  std::int64_t skipped = 0;        // steps since the beginning that were not finite and changed no weight
  bool was_skipped = false;        // this one was
};

// One evaluation.
struct EvaluationReport {
  std::int64_t step = 0;
  double loss = 0.0;  // mean cross-entropy in nats
  std::optional<double> bits_per_byte;
  std::optional<double> average_loss;  // of the moving average of the weights
  std::optional<double> average_bits_per_byte;
  bool best = false;     // no evaluation before it was as good (by the average, where there is one)
  double seconds = 0.0;  // since the beginning of the run
};

struct SampleReport {
  std::int64_t step = 0;
  std::string text;  // prompt and continuation
};

// {"step":12,"loss":3.21,"grad_norm":0.8,...}; null for what is not finite. With "\n".
[[nodiscard]] std::string json_line(const StepReport& report);
// {"step":500,"val_loss":1.7,"val_bits_per_byte":2.2,...}
[[nodiscard]] std::string json_line(const EvaluationReport& report);
// {"step":500,"text":"..."}
[[nodiscard]] std::string json_line(const SampleReport& report);

}  // namespace krait
