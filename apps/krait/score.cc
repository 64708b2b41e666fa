// krait score: how well a model predicts a text, or given token ids.
#include "krait/eval/score.h"

#include <memory>

#include "commands.h"
#include "input.h"
#include "json_object.h"
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
  const Score result = options.ids.empty() ? score_text(ctx, model, load_tokenizer(files),
                                                        read_text(options.text), options.block)
                                           : score_ids(ctx, model, read_ids(options.ids));
  report_profile(ctx);
  return result;
}

void run(const Options& options) {
  const Score result = score(options);
  if (options.json) {
    JsonObject root;
    root.add("loss", result.loss).add("perplexity", result.perplexity);
    if (result.bits_per_byte) root.add("bits_per_byte", *result.bits_per_byte);
    print(root.add("tokens", result.tokens).line());
    return;
  }
  print(concat("loss           ", result.loss, " nats per token\n"));
  print(concat("perplexity     ", result.perplexity, "\n"));
  if (result.bits_per_byte) print(concat("bits per byte  ", *result.bits_per_byte, "\n"));
  print(concat("tokens         ", result.tokens, "\n"));
}

}  // namespace

void add_score(const Command& program) {
  auto options = std::make_shared<Options>();
  const Command command = program.add_command("score", "Measure how well a model predicts a text");
  add_model(command, options->common);
  const Option ids = command
                         .text("--ids", options->ids, "FILE",
                               "Token ids, (n, length) int64 in a .npy file; each row from an empty state")
                         .not_empty();
  const Option text =
      command.text("--text", options->text, "FILE", "A text file; - is standard input").not_empty();
  command.require_one({ids, text});
  command
      .integer("--block", options->block, 2, kMaxCount,
               "Cut the text into blocks of N tokens, each from an empty state; else it is one stream")
      .needs(text);
  command.flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
