// What a person, or a program, sees of a training run.
#pragma once

#include <chrono>
#include <filesystem>
#include <string>
#include <string_view>

#include "krait/train/train.h"

namespace krait::cli {

// On a terminal: one line that is drawn over on stderr, with lines on stdout for what happens on the way.
// Elsewhere: lines on stdout, twenty in a run and one wherever ten seconds went by without.
class TrainProgress {
 public:
  TrainProgress();
  ~TrainProgress();
  TrainProgress(const TrainProgress&) = delete;
  TrainProgress& operator=(const TrainProgress&) = delete;

  void start(const RunStart& start);
  void step(const StepReport& report);
  void evaluation(const EvaluationReport& report);
  void sample(const SampleReport& report);
  void checkpoint(const std::filesystem::path& path);
  void end(const TrainResult& result, const std::string& directory);
  // Takes the line away, so that something else can be written.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;

  void line(std::string_view text);
  [[nodiscard]] std::string describe(const StepReport& report) const;

  bool terminal_;
  bool drawn_ = false;
  RunStart start_;
  Clock::time_point began_ = Clock::now();
  Clock::time_point last_ = Clock::now();
};

}  // namespace krait::cli
