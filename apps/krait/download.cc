// krait download: a model of the hub into the local cache, ahead of its use.
#include <functional>
#include <memory>

#include "commands.h"
#include "krait/core/error.h"
#include "krait/io/hub.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

void run(const CommonOptions& options) {
  const auto id = hub::parse_model_id(options.model);
  require(id.has_value(), "model '", options.model, "', expected org/name or org/name@revision");
  hub::Options hub_options = hub::options_from_environment();
  hub::ProgressBar bar;
  if (!options.quiet) hub_options.progress = std::ref(bar);
  hub_options.cancelled = interrupted;
  hub_options.log = context_options(options).log;
  print(hub::download(*id, hub_options).string() + "\n");
}

}  // namespace

void add_download(const Command& program) {
  auto options = std::make_shared<CommonOptions>();
  const Command command =
      program.add_command("download", "Fetch a model into the cache and print its directory");
  command.text("model", options->model, "MODEL", "Name on the hub: org/name[@revision]").required();
  add_messages(command, *options);
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
