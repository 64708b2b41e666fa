// The command-line program, for `python -m krait`.
#include "program.h"

#include <signal.h>

#include <array>
#include <cstdint>
#include <vector>

#include "ffi/model.h"

namespace krait::ffi {
namespace {

// Gives signals back to whom they belonged.
class SignalHandlers {
 public:
  SignalHandlers() {
    for (std::size_t i = 0; i < kSignals.size(); ++i) ::sigaction(kSignals[i], nullptr, &before_[i]);
  }
  ~SignalHandlers() {
    for (std::size_t i = 0; i < kSignals.size(); ++i) ::sigaction(kSignals[i], &before_[i], nullptr);
  }
  SignalHandlers(const SignalHandlers&) = delete;
  SignalHandlers& operator=(const SignalHandlers&) = delete;

 private:
  static constexpr std::array kSignals{SIGINT, SIGTERM, SIGPIPE};
  std::array<struct sigaction, kSignals.size()> before_{};
};

// The arguments without the program's name; the exit code.
std::int64_t run_program(const Words& arguments) {
  std::vector<std::string> texts = texts_of(arguments);
  texts.insert(texts.begin(), "krait");
  std::vector<char*> argv;
  for (std::string& text : texts) argv.push_back(text.data());
  const auto argc = static_cast<int>(argv.size());
  argv.push_back(nullptr);
  const SignalHandlers before;
  return cli::run_program(argc, argv.data());
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(run_program, krait::ffi::run_program)
