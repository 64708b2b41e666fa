// krait info: what a checkpoint is made of.
#include <memory>

#include "commands.h"
#include "input.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  bool json = false;
};

}  // namespace

void add_info(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App& command =
      *app.add_subcommand("info", "Describe a model: architecture, parameters, dtypes, state");
  add_model(command, options->common);
  command.add_flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
}

}  // namespace krait::cli
