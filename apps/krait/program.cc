#include "program.h"

#include <exception>
#include <new>

#include "commands.h"
#include "krait/core/error.h"
#include "terminal.h"
#include "version.h"

namespace krait::cli {
namespace {

constexpr int kFailed = 1;
constexpr int kMisused = 2;
constexpr int kInterrupted = 130;

void run(int argc, char** argv) {
  Program program("krait", "Mamba and other state-space language models on this machine's own processors.",
                  version_text);
  for (const auto add :
       {add_generate, add_logits, add_score, add_eval, add_train, add_report, add_tokenizer, add_data,
        add_convert, add_bench, add_info, add_tokenize, add_download, add_man, add_completion})
    add(program.command());
  program.run(argc, argv);
  flush();
}

int exit_code(int argc, char** argv) {
  try {
    run(argc, argv);
    return interrupted() ? kInterrupted : 0;
  } catch (const UsageError& error) {
    message(error.what());
    return kMisused;
  } catch (const Error& error) {
    message(error.what());
    return error.kind() == ErrorKind::interrupted ? kInterrupted : kFailed;
  } catch (const std::bad_alloc&) {
    message("out of memory");
  } catch (const std::exception& error) {
    message(error.what());
  }
  return kFailed;
}

}  // namespace

int run_program(int argc, char** argv) {
  install_signal_handlers();
  return exit_code(argc, argv);
}

}  // namespace krait::cli
