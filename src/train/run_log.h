// What a training run has written into its directory, for reports.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace krait::report {

struct Point {
  double step = 0.0;
  double value = 0.0;
};

struct Sample {
  double step = 0.0;
  std::string text;
};

struct RunLog {
  std::string name;  // of the directory
  // The numbers of metrics.jsonl by key ("loss", "val_loss", "lr", ...), each in the order of steps. Where a
  // step was logged again, after the run went back to a checkpoint, the later line counts.
  std::map<std::string, std::vector<Point>> curves;
  std::vector<std::pair<std::string, std::string>> settings;  // in the order of settings.json
  std::vector<Sample> samples;                                // in the order of steps, likewise
};

// Reads metrics.jsonl and, where they are there, settings.json and samples.jsonl. A run may be under way or
// have been killed: a last line that is cut off is left out, and so are values that are no finite numbers.
// Throws Error naming file and line for anything else that is not as expected.
[[nodiscard]] RunLog read_run_log(const std::filesystem::path& directory);

// The parts, from the contents of the files; `name` is for messages.
[[nodiscard]] std::map<std::string, std::vector<Point>> parse_metrics(std::string_view lines,
                                                                      const std::string& name);
[[nodiscard]] std::vector<Sample> parse_samples(std::string_view lines, const std::string& name);
[[nodiscard]] std::vector<std::pair<std::string, std::string>> parse_settings(std::string_view json,
                                                                              const std::string& name);

}  // namespace krait::report
