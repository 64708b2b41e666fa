// krait bench: speed of a model, or of one operator, beside what the machine can do at most.
#include "krait/bench/bench.h"

#include <chrono>
#include <iomanip>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "input.h"
#include "krait/core/error.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct ModelOptions {
  CommonOptions common;
  std::string config;
  bool json = false;
  ModelBenchOptions bench;
};

struct OpOptions {
  CommonOptions common;
  std::string name;
  std::vector<std::string> shape;
  std::int64_t repeat = 20;
  bool json = false;
};

// "name   value unit", the values in one column.
void print_row(std::string_view name, double value, int digits, std::string_view unit) {
  std::ostringstream row;
  row << std::left << std::setw(18) << name << std::right << std::fixed << std::setprecision(digits)
      << std::setw(12) << value << ' ' << unit << '\n';
  print(row.str());
}

LanguageModel make_model(Context& ctx, const ModelOptions& options) {
  if (options.config.empty())
    return load_language_model(ctx, open_checkpoint(options.common), load_options(options.common));
  LanguageModel model(parse_config(read_text(options.config), options.config));
  model.initialize(/*seed=*/0, parse_dtype(options.common.dtype).value_or(DType::f32));
  model.prepare();
  return model;
}

void run_model(const ModelOptions& options) {
  Context ctx(context_options(options.common));
  const auto begin = std::chrono::steady_clock::now();
  LanguageModel model = make_model(ctx, options);
  const std::chrono::duration<double> load = std::chrono::steady_clock::now() - begin;
  const ModelBench b = bench_model(ctx, model, options.bench);
  if (options.json) {
    const nlohmann::ordered_json root = {
        {"prefill_tokens_per_second", b.prefill_tokens_per_second},
        {"decode_tokens_per_second", b.decode_tokens_per_second},
        {"load_seconds", load.count()},
        {"prefill_seconds", b.prefill_seconds},
        {"decode_seconds", b.decode_seconds},
        {"peak_memory_bytes", b.peak_memory_bytes},
        {"weight_bytes", b.weight_bytes},
        {"state_bytes", b.state_bytes},
        {"decode_share_of_bandwidth", b.decode_share_of_bandwidth},
        {"prefill_share_of_flops", b.prefill_share_of_flops},
        {"read_bytes_per_second", b.ceilings.read_bytes_per_second},
        {"flops_per_second", b.ceilings.flops_per_second},
        {"prompt_length", options.bench.prompt_length},
        {"new_tokens", options.bench.new_tokens},
        {"batch", options.bench.batch},
        {"repeat", options.bench.repeat},
        {"threads", ctx.threads()},
    };
    print(root.dump() + "\n");
    return;
  }
  print_row("load", load.count(), 3, "s");
  print_row("prefill", b.prefill_tokens_per_second, 1, "tokens per second");
  print_row("decode", b.decode_tokens_per_second, 1, "tokens per second");
  print_row("prefill reaches", 100 * b.prefill_share_of_flops, 1,
            concat("% of ", b.ceilings.flops_per_second / 1e9, " GFLOP/s (f32)"));
  print_row("decode reaches", 100 * b.decode_share_of_bandwidth, 1,
            concat("% of ", b.ceilings.read_bytes_per_second / 1e9, " GB/s"));
  print_row("weights", static_cast<double>(b.weight_bytes) / 1e6, 1, "MB");
  print_row("state", static_cast<double>(b.state_bytes) / 1e6, 3, "MB for each sequence");
  print_row("peak memory", static_cast<double>(b.peak_memory_bytes) / 1e6, 1, "MB");
}

// "B=8" -> {"B", 8}
std::map<std::string, std::int64_t> parse_shape(const std::vector<std::string>& words) {
  std::map<std::string, std::int64_t> shape;
  for (const std::string& word : words) {
    const auto equals = word.find('=');
    std::int64_t size = 0;
    if (equals == 0 || equals == std::string::npos ||
        !CLI::detail::lexical_cast(word.substr(equals + 1), size))
      throw CLI::ValidationError("--shape", concat("found '", word, "', expected sizes such as B=8"));
    shape[word.substr(0, equals)] = size;
  }
  return shape;
}

void run_op(const OpOptions& options) {
  Context ctx(context_options(options.common));
  const OpBench b = bench_op(ctx, options.name, parse_shape(options.shape),
                             parse_dtype(options.common.dtype).value_or(DType::f32), options.repeat);
  if (options.json) {
    const nlohmann::ordered_json root = {
        {"op", b.name},
        {"shape", b.shape},
        {"backend", b.backend},
        {"seconds", b.seconds},
        {"bytes_per_second", b.bytes / b.seconds},
        {"flops_per_second", b.flops / b.seconds},
        {"read_bytes_per_second_ceiling", b.ceilings.read_bytes_per_second},
        {"flops_per_second_ceiling", b.ceilings.flops_per_second},
        {"threads", ctx.threads()},
    };
    print(root.dump() + "\n");
    return;
  }
  print(concat(b.name, " ", b.shape, " (", b.backend, ")\n"));
  print_row("time", 1e3 * b.seconds, 3, "ms");
  print_row("traffic", b.bytes / b.seconds / 1e9, 2,
            concat("GB/s, ceiling ", b.ceilings.read_bytes_per_second / 1e9));
  print_row("arithmetic", b.flops / b.seconds / 1e9, 2,
            concat("GFLOP/s, ceiling ", b.ceilings.flops_per_second / 1e9));
}

// "Operators and their sizes:", one a line with the defaults.
std::string list_of_operators() {
  std::string text = "Operators, and the sizes that they take where --shape does not say otherwise:\n";
  for (const auto& [name, letters] : bench_ops()) {
    text += "  " + name + " ";
    for (const auto& [letter, size] : letters) text += concat(" ", letter, "=", size);
    text += "\n";
  }
  return text;
}

void add_op(CLI::App& bench) {
  auto options = std::make_shared<OpOptions>();
  CLI::App& command = *bench.add_subcommand("op", "Measure one operator");
  command.add_option("name", options->name, "The operator")->type_name("NAME")->required();
  command.add_option("--shape", options->shape, "Sizes, such as B=8 L=2048")->type_name("LETTER=N");
  add_integer(command, "--repeat", options->repeat, 1, 1'000'000, "Runs, of which the median counts");
  command.add_flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
  command.footer(list_of_operators());
  command.callback([options] { run_op(*options); });
}

}  // namespace

void add_bench(CLI::App& app) {
  auto options = std::make_shared<ModelOptions>();
  ModelBenchOptions& b = options->bench;
  CLI::App& command = *app.add_subcommand("bench", "Measure the speed of a model or of one operator");
  auto* model = add_model(command, options->common);
  add_input_file(command, "--config", options->config,
                 "Random weights for this config.json (of type f32 unless --dtype says otherwise)")
      ->excludes(model);
  add_integer(command, "--prompt-length", b.prompt_length, 1, std::int64_t{1} << 40, "Tokens of each prompt");
  add_integer(command, "--new-tokens", b.new_tokens, 1, std::int64_t{1} << 40,
              "Tokens to make, one at a time");
  add_integer(command, "--batch", b.batch, 1, 1'000'000, "Sequences at once");
  add_integer(command, "--repeat", b.repeat, 1, 1'000'000, "Runs, of which the median counts");
  command.add_flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
  add_op(command);
  command.callback([options, &command] {
    if (command.get_subcommands().empty()) run_model(*options);
  });
}

}  // namespace krait::cli
