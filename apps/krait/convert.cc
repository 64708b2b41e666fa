// krait convert: a checkpoint in the format that another program reads.
#include <map>
#include <memory>

#include "commands.h"
#include "input.h"
#include "json_object.h"
#include "krait/core/error.h"
#include "krait/models/save.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string out;
  std::string to = "krait";
  bool json = false;
};

void run(const Options& options) {
  static const std::map<std::string, SaveFormat> kFormats{
      {"upstream", SaveFormat::upstream}, {"hf", SaveFormat::hf}, {"krait", SaveFormat::krait}};
  const SaveFormat format = kFormats.at(options.to);
  Context ctx(context_options(options.common));
  const ModelFiles files = open_checkpoint(options.common);
  LanguageModel model = load_language_model(ctx, files, load_options(options.common));
  const std::string tokenizer = tokenizer_json_of(files);
  // The weights may be mapped from the very files that would be replaced.
  std::error_code ignored;
  require(options.common.model.empty() ||
              !std::filesystem::equivalent(options.common.model, options.out, ignored),
          options.out, ": is the model itself, expected another directory");
  // Nor anybody else's.
  for (const char* name : {"model.safetensors", "pytorch_model.bin"})
    require(!std::filesystem::exists(std::filesystem::path(options.out) / name), options.out, ": holds a ",
            name, " already, expected a new directory");
  try {
    save_language_model(model, options.out, {.format = format, .tokenizer_json = tokenizer});
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::invalid_argument) throw;
    fail(e.kind(), files.name, ": ", e.what());
  }
  if (tokenizer.empty() && !options.common.quiet)
    message(concat(files.name, ": has no tokenizer.json, none was written"));
  if (options.json) print(JsonObject().add("out", options.out).add("format", options.to).line());
}

}  // namespace

void add_convert(const Command& program) {
  auto options = std::make_shared<Options>();
  const Command command =
      program.add_command("convert", "Write a model in the format that another program reads");
  add_model(command, options->common);
  command.text("--out", options->out, "DIR", "The directory to write, made where it does not exist")
      .required()
      .not_empty();
  command.choice("--to", options->to, {"upstream", "hf", "krait"},
                 "mamba_ssm's pytorch_model.bin, Hugging Face's transformers, or upstream's names in "
                 "model.safetensors");
  command.flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
