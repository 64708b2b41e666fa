// krait generate: a prompt, or a batch of them, and its continuation.
#include "krait/generate/generate.h"

#include <algorithm>
#include <iomanip>
#include <limits>
#include <memory>
#include <random>

#include "commands.h"
#include "input.h"
#include "json_object.h"
#include "krait/core/error.h"
#include "krait/io/npy.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string prompt;
  std::string prompt_file;
  std::string ids;
  bool batch = false;
  bool logprobs = false;
  bool json = false;
  std::string out;
  std::optional<std::uint64_t> seed;
  GenerateOptions generate;
};

struct Prompts {
  std::vector<std::string> texts;  // empty where ids were given
  std::vector<std::vector<std::int64_t>> ids;
};

Prompts read_prompts(const Options& options, const Tokenizer* tokenizer) {
  if (!options.ids.empty()) return {.texts = {}, .ids = rows_of(read_ids(options.ids))};
  Prompts prompts;
  if (options.batch) {
    prompts.texts = read_lines(options.prompt_file);
    require(!prompts.texts.empty(), options.prompt_file, ": is empty, expected a prompt on each line");
  } else if (!options.prompt_file.empty()) {
    prompts.texts = {read_text(options.prompt_file)};
    if (prompts.texts[0].ends_with('\n')) prompts.texts[0].pop_back();  // the one that editors add
  } else {
    prompts.texts = {options.prompt};
  }
  for (const std::string& text : prompts.texts)
    prompts.ids.push_back(tokenizer->encode(text, {.add_special_tokens = true}));
  return prompts;
}

// Checkpoints without a tokenizer are still of use with --ids.
std::optional<Tokenizer> find_tokenizer(const ModelFiles& files, const Options& options) {
  try {
    return load_tokenizer(files);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::not_found || options.ids.empty()) throw;
    return std::nullopt;
  }
}

// (batch, longest) i64. Shorter sequences are filled up with the end-of-text id.
void write_ids(const std::string& path, const GenerateResult& result, const ModelConfig& config) {
  std::size_t longest = 0;
  for (const Generation& g : result.sequences) longest = std::max(longest, g.ids.size());
  std::vector<std::int64_t> ids;
  for (const Generation& g : result.sequences) {
    ids.insert(ids.end(), g.ids.begin(), g.ids.end());
    ids.resize(ids.size() + longest - g.ids.size(),
               config.eos_token_ids.empty() ? 0 : config.eos_token_ids[0]);
  }
  io::write_npy(path, Tensor::from(ids, {static_cast<std::int64_t>(result.sequences.size()),
                                         static_cast<std::int64_t>(longest)}));
}

std::span<const std::int64_t> new_ids(const Generation& g) {
  return std::span(g.ids).subspan(static_cast<std::size_t>(g.prompt_length));
}

std::string to_json(const GenerateResult& result, const Prompts& prompts, const Options& options) {
  std::vector<JsonObject> sequences;
  for (std::size_t i = 0; i < result.sequences.size(); ++i) {
    const Generation& g = result.sequences[i];
    JsonObject& sequence = sequences.emplace_back();
    if (!prompts.texts.empty()) sequence.add("prompt", prompts.texts[i]);
    sequence.add("text", g.text).add("prompt_tokens", g.prompt_length).add("ids", g.ids);
    if (options.logprobs) sequence.add("logprobs", g.logprobs);
    sequence.add("finish_reason", name_of(g.finish));
  }
  return JsonObject()
      .add("sequences", sequences)
      .add("seed", options.generate.seed)
      .add("prompt_tokens", result.prompt_tokens)
      .add("new_tokens", result.new_tokens)
      .add("prefill_seconds", result.prefill_seconds)
      .add("decode_seconds", result.decode_seconds)
      .line();
}

// One line for each new token: its id, its log-probability, and the token as JSON spells it.
void print_logprobs(const Generation& g, const Tokenizer* tokenizer) {
  const auto ids = new_ids(g);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    std::ostringstream line;
    line << ids[i] << '\t' << std::fixed << std::setprecision(6) << g.logprobs[i];
    if (tokenizer != nullptr) {
      line << '\t' << json_string(tokenizer->decode(ids.subspan(i, 1)));
    }
    print(line.str() + "\n");
  }
}

void print_ids(const Generation& g) {
  std::string line;
  for (const std::int64_t id : new_ids(g)) line += (line.empty() ? "" : " ") + std::to_string(id);
  print(line + "\n");
}

void report_speed(const GenerateResult& result, const Options& options) {
  const auto rate = [](std::int64_t tokens, double seconds) {
    std::ostringstream text;
    text << std::fixed << tokens << " tokens in " << std::setprecision(3) << seconds << " s";
    if (tokens > 0 && seconds > 0)
      text << ": " << std::setprecision(1) << static_cast<double>(tokens) / seconds << " tokens per second";
    return text.str();
  };
  // The first token of each sequence comes out of the prefill.
  const auto sequences = static_cast<std::int64_t>(result.sequences.size());
  message("prompt " + rate(result.prompt_tokens, result.prefill_seconds));
  message("decode " + rate(std::max<std::int64_t>(0, result.new_tokens - sequences), result.decode_seconds));
  message(concat("seed ", options.generate.seed));
}

void run(Options& options) {
  Context ctx(context_options(options.common));
  const ModelFiles files = open_checkpoint(options.common);
  const LanguageModel model = load_language_model(ctx, files, load_options(options.common));
  const std::optional<Tokenizer> tokenizer = find_tokenizer(files, options);
  const Tokenizer* words = tokenizer ? &*tokenizer : nullptr;
  const Prompts prompts = read_prompts(options, words);
  options.generate.seed = options.seed ? *options.seed : std::random_device{}();
  options.generate.state_dtype = state_dtype_of(options.common);

  // One sequence streams as it is made; of several, each is printed when all are done.
  const bool text = words != nullptr && !options.json && !options.logprobs;
  const bool stream = text && prompts.ids.size() == 1;
  if (stream) {
    print(prompts.texts.empty() ? words->decode(prompts.ids[0]) : prompts.texts[0]);
    flush();
    options.generate.on_text = [](std::int64_t, std::string_view piece) {
      print(piece);
      flush();
    };
  }
  const GenerateResult result = generate(ctx, model, words, prompts.ids, options.generate);
  if (!options.out.empty()) write_ids(options.out, result, model.config());
  if (options.json) print(to_json(result, prompts, options));
  for (std::size_t i = 0; i < result.sequences.size() && !options.json; ++i) {
    const Generation& g = result.sequences[i];
    if (options.logprobs) {
      if (stream || i > 0) print("\n");
      print_logprobs(g, words);
    } else if (stream) {
      print("\n");
    } else if (text) {
      print((prompts.texts.empty() ? words->decode(prompts.ids[i]) : prompts.texts[i]) + g.text + "\n");
    } else if (options.out.empty()) {
      print_ids(g);
    }
  }
  flush();
  if (options.common.verbose) report_speed(result, options);
  report_profile(ctx);
}

}  // namespace

void add_generate(const Command& program) {
  auto options = std::make_shared<Options>();
  GenerateOptions& g = options->generate;
  const Command command = program.add_command("generate", "Continue a prompt");
  add_model(command, options->common);

  const Option prompt = command.text("--prompt,-p", options->prompt, "TEXT", "A text to continue");
  const Option prompt_file =
      command
          .text("--prompt-file,-f", options->prompt_file, "FILE", "A file with the text; - is standard input")
          .not_empty();
  const Option ids =
      command.text("--ids", options->ids, "FILE", "Token ids, (batch, length) int64 in a .npy file")
          .not_empty();
  command.require_one({prompt, prompt_file, ids});
  command.flag("--batch", options->batch, "Each line of --prompt-file is a prompt; they run as one batch")
      .needs(prompt_file);

  command.integer("--max-new-tokens,-n", g.max_new_tokens, 0, kMaxCount, "Tokens to make at most");
  constexpr double kLargest = std::numeric_limits<double>::max();
  command.number("--temperature", g.sampling.temperature, 0, kLargest, "0 is greedy");
  command.integer("--top-k", g.sampling.top_k, 0, kMaxCount,
                  "Draw from the N most probable tokens; 0 is off, 1 is greedy");
  command.number("--top-p", g.sampling.top_p, 0, 1,
                 "Draw from the most probable tokens that together reach this probability; 1 is off");
  command.number("--min-p", g.sampling.min_p, 0, 1,
                 "Draw from tokens at least this probable beside the most probable one; off with --top-k");
  command.number("--repetition-penalty", g.sampling.repetition_penalty, 0, kLargest,
                 "Above 1: make tokens that were there already less probable");
  command.integer("--seed", options->seed, "Seed of the draws; from the system where left out");
  command.texts("--stop", g.stop, "TEXT", /*greedy=*/false,
                "End before this text; may be given several times");
  command.flag("--ignore-eos", g.ignore_eos, "Go on after the model's end of text");

  add_state_dtype(command, options->common);
  command.flag("--logprobs", options->logprobs, "Print each new token with its log-probability");
  command
      .text("--out,-o", options->out, "FILE",
            "Write prompt and continuation as token ids, (batch, length + new) int64, to a .npy file")
      .not_empty();
  command.flag("--json", options->json, "Print one JSON object instead of text");
  add_common(command, options->common);
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
