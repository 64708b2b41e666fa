// krait logits: the model's raw output for given token ids.
#include <memory>

#include "commands.h"
#include "input.h"
#include "krait/eval/score.h"
#include "krait/io/npy.h"
#include "options.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string ids;
  std::string out;
};

void run(const Options& options) {
  Context ctx(context_options(options.common));
  const LanguageModel model =
      load_language_model(ctx, open_checkpoint(options.common), load_options(options.common));
  io::write_npy(options.out, logits_of_ids(ctx, model, read_ids(options.ids)));
  report_profile(ctx);
}

}  // namespace

void add_logits(const Command& program) {
  auto options = std::make_shared<Options>();
  const Command command = program.add_command("logits", "Write the logits of given token ids");
  add_model(command, options->common);
  command.text("--ids", options->ids, "FILE", "Token ids, (batch, length) int64 in a .npy file").required();
  command
      .text("--out,-o", options->out, "FILE",
            "The logits, (batch, length, vocabulary) float32, rows that pad the head included")
      .required();
  add_common(command, options->common);
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
