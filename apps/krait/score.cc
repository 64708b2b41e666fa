// krait score: how well a model predicts a text, or given token ids.
#include "krait/eval/score.h"

#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "input.h"
#include "krait/core/error.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string ids;
  std::string text;
  std::int64_t block = 0;
  bool json = false;
};

Score score(const Options& options) {
  Context ctx(context_options(options.common));
  const ModelFiles files = open_checkpoint(options.common);
  const LanguageModel model = load_language_model(ctx, files, load_options(options.common));
  if (!options.ids.empty()) return score_ids(ctx, model, read_ids(options.ids));
  return score_text(ctx, model, load_tokenizer(files), read_text(options.text), options.block);
}

void run(const Options& options) {
  const Score result = score(options);
  if (options.json) {
    nlohmann::ordered_json root;
    root["loss"] = result.loss;
    root["perplexity"] = result.perplexity;
    if (result.bits_per_byte) root["bits_per_byte"] = *result.bits_per_byte;
    root["tokens"] = result.tokens;
    print(root.dump() + "\n");
    return;
  }
  print(concat("loss           ", result.loss, " nats per token\n"));
  print(concat("perplexity     ", result.perplexity, "\n"));
  if (result.bits_per_byte) print(concat("bits per byte  ", *result.bits_per_byte, "\n"));
  print(concat("tokens         ", result.tokens, "\n"));
}

}  // namespace

void add_score(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App& command = *app.add_subcommand("score", "Measure how well a model predicts a text");
  add_model(command, options->common);
  auto* ids = add_input_file(command, "--ids", options->ids,
                             "Token ids, (n, length) int64 in a .npy file; each row from an empty state");
  auto* text = add_input_file(command, "--text", options->text, "A text file; - is standard input");
  require_one(command, {ids, text});
  add_integer(command, "--block", options->block, 2, std::int64_t{1} << 40,
              "Cut the text into blocks of N tokens, each from an empty state; else it is one stream")
      ->default_str("")
      ->needs(text);
  command.add_flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
  command.callback([options] { run(*options); });
}

}  // namespace krait::cli
