// krait bench: speed of a model, or of one operator, beside what the machine can do at most.
#include "krait/bench/bench.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <iomanip>
#include <memory>

#include "commands.h"
#include "input.h"
#include "json_object.h"
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
  bool train = false;
  std::string recompute = "none";
  TrainBenchOptions training;
};

struct OpOptions {
  CommonOptions common;
  std::string name;
  std::vector<std::string> shape;
  std::string state_dtype = "auto";
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
  // Training starts from f32 weights; --dtype says what it multiplies in.
  CommonOptions common = options.common;
  if (options.train) common.dtype = "f32";
  if (options.config.empty()) return load_language_model(ctx, open_checkpoint(common), load_options(common));
  return random_model(ctx, parse_config(read_text(options.config), options.config),
                      parse_dtype(common.dtype).value_or(DType::f32));
}

void run_training(const ModelOptions& options) {
  Context ctx(context_options(options.common));
  LanguageModel model = make_model(ctx, options);
  TrainBenchOptions training = options.training;
  training.dtype = parse_dtype(options.common.dtype).value_or(DType::f32);
  training.recompute = options.recompute == "block" ? Recompute::block : Recompute::none;
  training.repeat = options.bench.repeat;
  const TrainBench b = bench_training(ctx, model, training);
  report_profile(ctx);
  const double bytes_per_parameter =
      static_cast<double>(b.peak_memory_bytes) / static_cast<double>(b.parameters);
  if (options.json) {
    const std::map<std::string, std::int64_t> parts(b.tape_parts.begin(), b.tape_parts.end());
    print(JsonObject()
              .add("tokens_per_second", b.tokens_per_second)
              .add("step_seconds", b.step_seconds)
              .add("share_of_flops", b.share_of_flops)
              .add("parameters", b.parameters)
              .add("multiplied_parameters", b.multiplied_parameters)
              .add("peak_memory_bytes", b.peak_memory_bytes)
              .add("peak_memory_bytes_per_parameter", bytes_per_parameter)
              .add("tape_bytes", b.tape_bytes)
              .add("tape_parts", parts)
              .add("read_bytes_per_second", b.ceilings.read_bytes_per_second)
              .add("flops_per_second", b.ceilings.flops_per_second)
              .add("batch_size", training.batch_size)
              .add("seq_len", training.seq_len)
              .add("recompute", options.recompute)
              .add("repeat", training.repeat)
              .add("threads", ctx.threads())
              .line());
    return;
  }
  print_row("training", b.tokens_per_second, 1, "tokens per second");
  print_row("step", b.step_seconds, 3, "s");
  print_row("step reaches", 100 * b.share_of_flops, 1,
            concat("% of ", b.ceilings.flops_per_second / 1e9, " GFLOP/s (f32)"));
  print_row("peak memory", static_cast<double>(b.peak_memory_bytes) / 1e6, 1,
            concat("MB, ", bytes_per_parameter, " bytes for each of ", b.parameters, " parameters"));
  print_row("tape", static_cast<double>(b.tape_bytes) / 1e6, 1, "MB, of which the largest:");
  constexpr std::size_t kLargest = 5;
  for (std::size_t i = 0; i < std::min(kLargest, b.tape_parts.size()); ++i)
    print_row("  " + b.tape_parts[i].first, static_cast<double>(b.tape_parts[i].second) / 1e6, 1, "MB");
}

void run_model(const ModelOptions& options) {
  if (options.train) return run_training(options);
  Context ctx(context_options(options.common));
  const auto begin = std::chrono::steady_clock::now();
  LanguageModel model = make_model(ctx, options);
  const std::chrono::duration<double> load = std::chrono::steady_clock::now() - begin;
  ModelBenchOptions bench = options.bench;
  bench.state_dtype = state_dtype_of(options.common);
  const ModelBench b = bench_model(ctx, model, bench);
  report_profile(ctx);
  if (options.json) {
    print(JsonObject()
              .add("prefill_tokens_per_second", b.prefill_tokens_per_second)
              .add("decode_tokens_per_second", b.decode_tokens_per_second)
              .add("load_seconds", load.count())
              .add("prefill_seconds", b.prefill_seconds)
              .add("decode_seconds", b.decode_seconds)
              .add("peak_memory_bytes", b.peak_memory_bytes)
              .add("weight_bytes", b.weight_bytes)
              .add("state_bytes", b.state_bytes)
              .add("decode_share_of_bandwidth", b.decode_share_of_bandwidth)
              .add("prefill_share_of_flops", b.prefill_share_of_flops)
              .add("read_bytes_per_second", b.ceilings.read_bytes_per_second)
              .add("flops_per_second", b.ceilings.flops_per_second)
              .add("prompt_length", options.bench.prompt_length)
              .add("new_tokens", options.bench.new_tokens)
              .add("batch", options.bench.batch)
              .add("state_dtype", options.common.state_dtype)
              .add("repeat", options.bench.repeat)
              .add("threads", ctx.threads())
              .line());
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
  print_row("state", static_cast<double>(b.state_bytes) / 1e6, 3,
            concat("MB for each sequence, SSM states in ", options.common.state_dtype));
  print_row("peak memory", static_cast<double>(b.peak_memory_bytes) / 1e6, 1, "MB");
}

// "B=8" -> {"B", 8}
std::map<std::string, std::int64_t> parse_shape(const std::vector<std::string>& words) {
  std::map<std::string, std::int64_t> shape;
  for (const std::string& word : words) {
    const auto equals = word.find('=');
    const char* end = word.data() + word.size();
    std::int64_t size = 0;
    if (equals == 0 || equals == std::string::npos ||
        std::from_chars(word.data() + equals + 1, end, size) != std::from_chars_result{end, std::errc()})
      throw UsageError(concat("--shape: found '", word, "', expected sizes such as B=8"));
    shape[word.substr(0, equals)] = size;
  }
  return shape;
}

void run_op(const OpOptions& options) {
  Context ctx(context_options(options.common));
  const OpBench b = bench_op(ctx, options.name, parse_shape(options.shape),
                             parse_dtype(options.common.dtype).value_or(DType::f32), options.repeat,
                             parse_dtype(options.state_dtype));
  report_profile(ctx);
  if (options.json) {
    print(JsonObject()
              .add("op", b.name)
              .add("shape", b.shape)
              .add("dtype", b.dtype)
              .add("backend", b.backend)
              .add("seconds", b.seconds)
              .add("bytes_per_second", b.bytes / b.seconds)
              .add("flops_per_second", b.flops / b.seconds)
              .add("read_bytes_per_second_ceiling", b.ceilings.read_bytes_per_second)
              .add("flops_per_second_ceiling", b.ceilings.flops_per_second)
              .add("threads", ctx.threads())
              .line());
    return;
  }
  print(concat(b.name, " ", b.shape, " ", b.dtype, " (", b.backend, ")\n"));
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

void add_op(const Command& bench) {
  auto options = std::make_shared<OpOptions>();
  const Command command = bench.add_command("op", "Measure one operator");
  command.text("name", options->name, "NAME", "The operator").required();
  command.texts("--shape", options->shape, "LETTER=N", /*greedy=*/true, "Sizes, such as B=8 L=2048");
  command.choice("--state-dtype", options->state_dtype, {"auto", "f32", "bf16", "f16"},
                 "Type of the state of state_update; auto is that of --dtype");
  command.integer("--repeat", options->repeat, 1, 1'000'000, "Runs, of which the median counts");
  command.flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
  command.epilogue(list_of_operators());
  command.on_run([options] { run_op(*options); });
}

}  // namespace

void add_bench(const Command& program) {
  auto options = std::make_shared<ModelOptions>();
  ModelBenchOptions& b = options->bench;
  const Command command = program.add_command("bench", "Measure the speed of a model or of one operator");
  const Option model = add_model(command, options->common);
  command
      .text("--config", options->config, "FILE",
            "Random weights for this config.json (of type f32 unless --dtype says otherwise)")
      .not_empty()
      .excludes(model);
  command.integer("--prompt-length", b.prompt_length, 1, kMaxCount, "Tokens of each prompt");
  command.integer("--new-tokens", b.new_tokens, 0, kMaxCount, "Tokens to make, one at a time");
  command.integer("--batch", b.batch, 1, 1'000'000, "Sequences at once");
  add_state_dtype(command, options->common);
  command.integer("--repeat", b.repeat, 1, 1'000'000, "Runs, of which the median counts");
  TrainBenchOptions& t = options->training;
  const Option train = command.flag("--train", options->train, "Measure steps of training on random tokens");
  command.integer("--batch-size", t.batch_size, 1, 1'000'000, "Sequences of a step").needs(train);
  command.integer("--seq-len", t.seq_len, 1, kMaxCount, "Tokens of each sequence of a step").needs(train);
  command
      .choice("--recompute", options->recompute, {"none", "block"},
              "What a step computes a second time instead of keeping it")
      .needs(train);
  command.flag("--json", options->json, "Print one JSON object");
  add_common(command, options->common);
  add_op(command);
  command.on_run([options] { run_model(*options); });
}

}  // namespace krait::cli
