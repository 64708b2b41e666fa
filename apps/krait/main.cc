// krait: the command-line program. Exit codes: 0 done, 1 an error of input, files or network (one line on
// stderr), 2 a command line that was not understood, 130 interrupted.
#include <CLI/CLI.hpp>
#include <memory>
#include <new>

#include "commands.h"
#include "help_formatter.h"
#include "krait/core/error.h"
#include "terminal.h"
#include "version.h"

namespace {

// The innermost subcommand that was being parsed.
const CLI::App& parsed_command(const CLI::App& app) {
  const auto below = app.get_subcommands();
  return below.empty() ? app : parsed_command(*below.front());
}

std::string full_name(const CLI::App& app) {
  return app.get_parent() == nullptr ? app.get_name() : full_name(*app.get_parent()) + " " + app.get_name();
}

int usage_error(const CLI::App& app, const CLI::ParseError& error) {
  const std::string command = full_name(parsed_command(app));
  krait::cli::message(krait::concat(error.what(), " (see ", command, " --help)"));
  return 2;
}

int run(int argc, char** argv) {
  CLI::App app{"Mamba and other state-space language models on this machine's own processors.", "krait"};
  app.set_version_flag("--version", krait::cli::version_text, "Version, compiler, processor and backends");
  app.formatter(std::make_shared<krait::cli::HelpFormatter>());
  krait::cli::add_generate(app);
  krait::cli::add_logits(app);
  krait::cli::add_score(app);
  krait::cli::add_bench(app);
  krait::cli::add_info(app);
  krait::cli::add_tokenize(app);
  krait::cli::add_download(app);
  krait::cli::add_man(app);
  krait::cli::add_completion(app);
  try {
    app.parse(argc, argv);
    // require_subcommand() would complain of the absence before it complains of an unknown one.
    if (app.get_subcommands().empty()) throw CLI::RequiredError("A subcommand");
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    return usage_error(app, error);
  }
  krait::cli::flush();
  return krait::cli::interrupted() ? 130 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  krait::cli::install_signal_handlers();
  try {
    return run(argc, argv);
  } catch (const krait::Error& error) {
    krait::cli::message(error.what());
    return error.kind() == krait::ErrorKind::interrupted ? 130 : 1;
  } catch (const std::bad_alloc&) {
    krait::cli::message("out of memory");
  } catch (const std::exception& error) {
    krait::cli::message(error.what());
  }
  return 1;
}
