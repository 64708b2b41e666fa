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

void add_download(CLI::App& app) {
  auto options = std::make_shared<CommonOptions>();
  CLI::App& command = *app.add_subcommand("download", "Fetch a model into the cache and print its directory");
  command.add_option("model", options->model, "Name on the hub: org/name[@revision]")
      ->type_name("MODEL")
      ->required();
  add_messages(command, *options);
  command.callback([options] { run(*options); });
}

}  // namespace krait::cli
