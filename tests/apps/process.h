// Runs the built program as a user would, and looks at what it printed, wrote and returned.
#pragma once

#include <gtest/gtest.h>
#include <sys/types.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "io/scratch.h"

namespace krait::cli {

struct Outcome {
  int code = -1;  // exit code, or minus the signal that ended the process
  std::string out;
  std::string err;

  [[nodiscard]] nlohmann::json json() const { return nlohmann::json::parse(out); }
};

// A process under way, in an environment without network and with an empty model cache.
class Process {
 public:
  explicit Process(const std::vector<std::string>& arguments, std::string_view input = "");
  // Its standard output goes to `output` instead of the outcome.
  Process(const std::vector<std::string>& arguments, std::string_view input, const std::string& output);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  // What it has printed so far.
  [[nodiscard]] std::string out() const;
  void send(int signal) const;
  Outcome wait();

 private:
  void start(const std::vector<std::string>& arguments, const std::string& input, const std::string& output);

  io::Scratch scratch_;
  std::string out_path_;
  pid_t child_ = -1;
};

// krait with these arguments, to its end.
Outcome krait(const std::vector<std::string>& arguments, std::string_view input = "");

// The same, and expects that it succeeds without a word on stderr.
Outcome krait_ok(const std::vector<std::string>& arguments, std::string_view input = "");

// Expects exit code `code`, nothing on stdout, and one line on stderr with all of `parts`.
void expect_refusal(const std::vector<std::string>& arguments, int code,
                    const std::vector<std::string>& parts, std::string_view input = "");

// A file of tests/golden.
std::string golden(std::string_view path);
std::string read_file(const std::string& path);

}  // namespace krait::cli
