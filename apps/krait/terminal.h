// Standard output, messages and signals.
#pragma once

#include <string_view>

namespace krait::cli {

// Ctrl-C (or SIGTERM) sets interrupted(); a second one ends the process at once. Writing to a closed pipe is
// an error that print() sees instead of a signal.
void install_signal_handlers();
[[nodiscard]] bool interrupted();

// Writes to standard output. Throws Error(io) where that fails (a full disk). Where the reader of a pipe has
// gone, the process ends as any Unix program does then.
void print(std::string_view text);
void flush();

// One line "krait: ..." on stderr.
void message(std::string_view text);

}  // namespace krait::cli
