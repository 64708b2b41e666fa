// krait info: what a checkpoint is made of.
#include <iomanip>
#include <memory>

#include "commands.h"
#include "input.h"
#include "json_object.h"
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
  print(JsonObject()
            .add("model", name)
            .add("format", d.format)
            .add("architecture", d.architecture)
            .add("d_model", d.d_model)
            .add("n_layer", d.n_layer)
            .add("vocab_size", d.vocab_size)
            .add("padded_vocab_size", d.padded_vocab_size)
            .add("tied_embeddings", d.tied_embeddings)
            .add("parameters", d.parameters)
            .add("parameters_by_part", d.parameters_by_part)
            .add("bytes_by_dtype", d.bytes_by_dtype)
            .add("weight_bytes", d.weight_bytes)
            .add("state_bytes_per_sequence", d.state_bytes_per_sequence)
            .add("state_bytes_per_token", d.state_bytes_per_token)
            .line());
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

void add_info(const Command& program) {
  auto options = std::make_shared<Options>();
  const Command command =
      program.add_command("info", "Describe a model: architecture, parameters, dtypes, state");
  add_model(command, options->common);
  command.flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
