// The command-line program as a function, for its main() and for `python -m krait`.
#pragma once

namespace krait::cli {

// Runs the command line `argv` and returns its exit code: 0 done, 1 an error of input, files or network (one
// line on stderr), 2 a command line that was not understood, 130 interrupted. From here on Ctrl-C and SIGTERM
// are this program's, and SIGPIPE is ignored (see install_signal_handlers).
int run_program(int argc, char** argv);

}  // namespace krait::cli
