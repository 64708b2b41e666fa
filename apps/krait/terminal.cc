#include "terminal.h"

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <string>

#include "krait/core/error.h"

namespace krait::cli {
namespace {

volatile std::sig_atomic_t interrupt_requested = 0;

void request_interrupt(int signal) {
  interrupt_requested = 1;
  std::signal(signal, SIG_DFL);
}

[[noreturn]] void fail_to_write() {
  const int error = errno;
  if (error == EPIPE) {
    std::signal(SIGPIPE, SIG_DFL);
    std::raise(SIGPIPE);
  }
  fail(ErrorKind::io, "standard output: ", std::strerror(error));
}

}  // namespace

void install_signal_handlers() {
  std::signal(SIGINT, request_interrupt);
  std::signal(SIGTERM, request_interrupt);
  std::signal(SIGPIPE, SIG_IGN);
}

bool interrupted() { return interrupt_requested != 0; }

void print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) fail_to_write();
}

void flush() {
  if (std::fflush(stdout) != 0) fail_to_write();
}

void message(std::string_view text) {
  std::string line = "krait: ";
  for (const char c : text) line += c == '\n' ? ' ' : c;
  line += '\n';
  std::fputs(line.c_str(), stderr);
}

}  // namespace krait::cli
