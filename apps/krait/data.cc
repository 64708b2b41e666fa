// krait data: files of training data. docs/training-data.md describes them.
#include <memory>

#include "commands.h"
#include "input.h"
#include "krait/core/error.h"
#include "krait/models/load.h"
#include "krait/train/token_file.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  std::vector<std::string> data;
  std::string tokenizer;
  std::string out;
};

Tokenizer named_tokenizer(const std::string& name) {
  if (name == "gpt-neox") return gpt_neox_tokenizer();
  const std::filesystem::path path(name);
  if (!std::filesystem::is_directory(path)) return Tokenizer::from_file(path);
  if (std::filesystem::exists(path / "tokenizer.json")) return Tokenizer::from_file(path / "tokenizer.json");
  return load_tokenizer(open_model_directory(path));
}

void pack(const Options& options) {
  Context ctx(context_options(options.common));
  const PackResult result =
      pack_token_file(ctx, {options.data.begin(), options.data.end()}, named_tokenizer(options.tokenizer),
                      options.out, {.progress = progress_of("encoding", options.common)});
  if (!options.common.quiet)
    print(concat(options.out, ": ", result.tokens, " tokens in ", result.documents, " documents, from ",
                 result.bytes, " bytes of text\n"));
}

}  // namespace

void add_data(const Command& program) {
  auto options = std::make_shared<Options>();
  const Command data = program.add_command("data", "Prepare training data");
  const Command command = data.add_command(
      "pack", "Encode texts into one file of token ids, which training maps instead of encoding");
  add_texts(command, options->data);
  command
      .text("--tokenizer", options->tokenizer, "T",
            "A tokenizer.json, the directory of a model, or gpt-neox for the bundled tokenizer of GPT-NeoX")
      .required()
      .not_empty();
  command.text("--out,-o", options->out, "FILE", "The file to write (.bin)").required().not_empty();
  add_threads(command, options->common);
  add_messages(command, options->common);
  command.on_run([options] { pack(*options); });
  data.on_run([] { throw UsageError("A subcommand is required"); });
}

}  // namespace krait::cli
