// The directory of a training run:
//   settings.json                 all settings
//   config.json, tokenizer.json   of the model
//   metrics.jsonl, samples.jsonl  run_record.h
//   tensorboard/                  likewise
//   checkpoints/step-N/           checkpoint.h
//   best-N.safetensors            weights of the best evaluation, that after step N
//   model.safetensors             the result
//   .lock                         held (flock) while a process works on the run
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

namespace krait {

class RunDirectory {
 public:
  // Takes the lock, which the system gives back when the process ends, however it ends. Throws where
  // another process has it, and where `path` holds anything while `resume` is false, or files but no run
  // while it is true. Removes what a killed process left half written.
  RunDirectory(std::filesystem::path path, bool resume);
  // Gives the lock back, and removes a directory in which nothing was begun.
  ~RunDirectory();
  RunDirectory(const RunDirectory&) = delete;
  RunDirectory& operator=(const RunDirectory&) = delete;

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  // There is a run in it already.
  [[nodiscard]] bool holds_run() const;

 private:
  void lock();
  void unlock();
  void clean_up() const;

  std::filesystem::path path_;
  bool created_ = false;
  int descriptor_ = -1;
};

// A file of lines to which whole lines are added.
class LineFile {
 public:
  // Appends to what is there.
  explicit LineFile(std::filesystem::path path);
  ~LineFile();
  LineFile(const LineFile&) = delete;
  LineFile& operator=(const LineFile&) = delete;

  // The line has reached the system when this returns. Throws Error(io) on a full disk.
  void add(std::string_view line) const;

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
};

// Keeps the lines of a file for which `keep` holds; a last line without an end is dropped. No file is as
// good as an empty one.
void filter_lines(const std::filesystem::path& path, const std::function<bool(std::string_view)>& keep);

}  // namespace krait
