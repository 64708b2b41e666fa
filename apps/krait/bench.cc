// krait bench: speed of a model, or of one operator beside the machine's ceiling.
#include <memory>

#include "commands.h"
#include "options.h"

namespace krait::cli {

void add_bench(CLI::App& app) {
  auto options = std::make_shared<CommonOptions>();
  CLI::App& command = *app.add_subcommand("bench", "Measure the speed of a model or of one operator");
  add_common(command, *options);
}

}  // namespace krait::cli
