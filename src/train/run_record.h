// What a run writes down as it goes: metrics.jsonl with a line for each logged step and each evaluation,
// samples.jsonl, and the same for TensorBoard in tensorboard/.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

#include "krait/train/metrics.h"
#include "krait/train/train.h"
#include "train/event_file.h"
#include "train/run_directory.h"

namespace krait {

class RunRecord {
 public:
  // Adds to what is there, of a run that goes on after `step`. `options`, which must outlive the record, has
  // the callbacks that are told of each line once it is written.
  RunRecord(const RunDirectory& directory, const TrainOptions& options, std::int64_t step);

  void add(const StepReport& report);
  void add(const EvaluationReport& report);
  void add(const SampleReport& report);

  // Keeps the lines for which `keep` holds: those up to the checkpoint that a run goes on from. Event files
  // stay as they are: the next one tells TensorBoard what to drop.
  static void filter(const RunDirectory& directory, const std::function<bool(std::string_view)>& keep);

 private:
  const TrainOptions& options_;
  LineFile metrics_;
  std::filesystem::path samples_;
  EventFileWriter events_;
};

}  // namespace krait
