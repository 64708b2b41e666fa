#include "apps/process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

namespace krait::cli {

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string golden(std::string_view path) { return std::string(KRAIT_GOLDEN_DIR) + "/" + std::string(path); }

Process::Process(const std::vector<std::string>& arguments, std::string_view input)
    : out_path_((scratch_ / "out").string()) {
  start(arguments, scratch_.put("in", input).string(), out_path_);
}

Process::Process(const std::vector<std::string>& arguments, std::string_view input,
                 const std::string& output) {
  start(arguments, scratch_.put("in", input).string(), output);
}

void Process::start(const std::vector<std::string>& arguments, const std::string& input,
                    const std::string& output) {
  std::vector<char*> argv{const_cast<char*>(KRAIT_PROGRAM)};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const std::string err = (scratch_ / "err").string();
  const std::string cache = (scratch_ / "cache").string();
  child_ = ::fork();
  if (child_ != 0) return;
  ::setenv("HF_HUB_OFFLINE", "1", 1);
  ::setenv("HF_HUB_CACHE", cache.c_str(), 1);
  const int in_fd = ::open(input.c_str(), O_RDONLY);
  const int out_fd = ::open(output.c_str(), O_WRONLY | O_CREAT, 0600);
  const int err_fd = ::open(err.c_str(), O_WRONLY | O_CREAT, 0600);
  if (in_fd < 0 || out_fd < 0 || err_fd < 0) ::_exit(126);
  ::dup2(in_fd, 0);
  ::dup2(out_fd, 1);
  ::dup2(err_fd, 2);
  ::execv(KRAIT_PROGRAM, argv.data());
  ::_exit(127);
}

Process::~Process() {
  if (child_ <= 0) return;
  ::kill(child_, SIGKILL);
  ::waitpid(child_, nullptr, 0);
}

std::string Process::out() const { return read_file(out_path_); }
void Process::send(int signal) const { ::kill(child_, signal); }

Outcome Process::wait() {
  int status = 0;
  ::waitpid(child_, &status, 0);
  child_ = -1;
  return {.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status),
          .out = out_path_.empty() ? "" : out(),
          .err = read_file((scratch_ / "err").string())};
}

Outcome krait(const std::vector<std::string>& arguments, std::string_view input) {
  return Process(arguments, input).wait();
}

Outcome krait_ok(const std::vector<std::string>& arguments, std::string_view input) {
  Outcome outcome = krait(arguments, input);
  EXPECT_EQ(outcome.code, 0) << "krait " << testing::PrintToString(arguments);
  EXPECT_EQ(outcome.err, "") << "krait " << testing::PrintToString(arguments);
  return outcome;
}

void expect_refusal(const std::vector<std::string>& arguments, int code,
                    const std::vector<std::string>& parts, std::string_view input) {
  SCOPED_TRACE("krait " + testing::PrintToString(arguments));
  const Outcome outcome = krait(arguments, input);
  EXPECT_EQ(outcome.code, code);
  EXPECT_EQ(outcome.out, "");
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
  EXPECT_TRUE(outcome.err.starts_with("krait: ") && outcome.err.ends_with('\n')) << outcome.err;
  for (const std::string& part : parts)
    EXPECT_NE(outcome.err.find(part), std::string::npos) << "no '" << part << "' in: " << outcome.err;
}

}  // namespace krait::cli
