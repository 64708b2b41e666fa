// krait info: what a checkpoint is made of.
#include <iomanip>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "input.h"
#include "krait/core/error.h"
#include "krait/models/describe.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  bool json = false;
};

void print_json(const std::string& name, const ModelDescription& d) {
  const nlohmann::ordered_json root = {
      {"model", name},
      {"format", d.format},
      {"architecture", d.architecture},
      {"d_model", d.d_model},
      {"n_layer", d.n_layer},
      {"vocab_size", d.vocab_size},
      {"padded_vocab_size", d.padded_vocab_size},
      {"tied_embeddings", d.tied_embeddings},
      {"parameters", d.parameters},
      {"parameters_by_part", d.parameters_by_part},
      {"bytes_by_dtype", d.bytes_by_dtype},
      {"weight_bytes", d.weight_bytes},
      {"state_bytes_per_sequence", d.state_bytes_per_sequence},
      {"state_bytes_per_token", d.state_bytes_per_token},
  };
  print(root.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

template <typename... Parts>
void print_row(std::string_view name, const Parts&... parts) {
  print(concat(std::left, std::setw(14), name, parts..., "\n"));
}

void print_text(const std::string& name, const ModelDescription& d) {
  print_row("model", name, " (", d.format, ")");
  print_row("architecture", d.architecture);
  print_row("d_model", d.d_model);
  print_row("vocabulary", d.vocab_size, ", padded to ", d.padded_vocab_size);
  print_row("parameters", d.parameters, d.tied_embeddings ? ", head tied to the embedding" : "");
  for (const auto& [part, count] : d.parameters_by_part) print_row("", count, " ", part);
  print_row("weights", d.weight_bytes, " bytes");
  for (const auto& [dtype, bytes] : d.bytes_by_dtype) print_row("", bytes, " ", dtype);
  print_row("state", d.state_bytes_per_sequence, " bytes for each sequence");
  if (d.state_bytes_per_token > 0) print_row("", d.state_bytes_per_token, " more for each token");
}

void run(const Options& options) {
  Context ctx(context_options(options.common));
  const ModelFiles files = open_checkpoint(options.common);
  LanguageModel model = load_language_model(ctx, files, load_options(options.common));
  (options.json ? print_json : print_text)(files.name, describe(model));
}

}  // namespace

void add_info(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App& command =
      *app.add_subcommand("info", "Describe a model: architecture, parameters, dtypes, state");
  add_model(command, options->common);
  command.add_flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
  command.callback([options] { run(*options); });
}

}  // namespace krait::cli
