// krait tokenizer: making tokenizers. (krait tokenize uses them.)
#include <memory>

#include "commands.h"
#include "input.h"
#include "krait/core/error.h"
#include "krait/io/atomic_file.h"
#include "krait/tokenizer/train.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  std::vector<std::string> data;
  std::vector<std::string> special_tokens;
  bool no_special_token = false;
  std::string out;
  TokenizerTrainOptions train;
};

void train(const Options& options) {
  Context ctx(context_options(options.common));
  io::AtomicFile file(options.out);  // before the work, so that a wrong name costs none
  TokenizerTrainOptions train = options.train;
  if (options.no_special_token || !options.special_tokens.empty())
    train.special_tokens = options.special_tokens;
  train.progress = progress_of("counting words", options.common);
  const TrainedTokenizer result = train_tokenizer(ctx, {options.data.begin(), options.data.end()}, train);
  file.write(result.json);
  file.commit();
  if (!options.common.quiet) print(concat(options.out, ": ", result.vocab_size, " tokens\n"));
}

}  // namespace

void add_tokenizer(const Command& program) {
  auto options = std::make_shared<Options>();
  const Command tokenizer = program.add_command("tokenizer", "Make a tokenizer");
  const Command command = tokenizer.add_command(
      "train", "Learn a byte-level BPE vocabulary from text and write a tokenizer.json");
  add_texts(command, options->data);
  command
      .integer("--vocab-size", options->train.vocab_size, 1, kMaxCount,
               "Tokens, with the 256 bytes and the special tokens")
      .required();
  command.text("--out,-o", options->out, "FILE", "The tokenizer.json to write").required().not_empty();
  const Option special = command.texts(
      "--special-token", options->special_tokens, "TEXT", false,
      "A token that stands for itself, with the first free id, from 0 on; may be given several times. The "
      "first ends texts. <|endoftext|> where left out");
  command.flag("--no-special-token", options->no_special_token, "No special token at all").excludes(special);
  command.integer("--min-frequency", options->train.min_frequency, 1, kMaxCount,
                  "Merge only pairs that occur so often");
  add_threads(command, options->common);
  add_messages(command, options->common);
  command.on_run([options] { train(*options); });
  tokenizer.on_run([] { throw UsageError("A subcommand is required"); });
}

}  // namespace krait::cli
