#include "options.h"

#include <iomanip>
#include <sstream>

#include "krait/core/error.h"
#include "terminal.h"

namespace krait::cli {

Option add_model(const Command& command, CommonOptions& options) {
  return command
      .text("--model,-m", options.model, "MODEL",
            "Directory of a checkpoint, or name of one on the hub (org/name[@revision]); "
            "the bundled model where left out")
      .not_empty();
}

void add_messages(const Command& command, CommonOptions& options) {
  const Option quiet = command.flag("--quiet,-q", options.quiet, "No progress and no warnings");
  command.flag("--verbose,-v", options.verbose, "Say what is done, and how fast").excludes(quiet);
}

void add_threads(const Command& command, CommonOptions& options) {
  command.integer("--threads", options.threads, 0, 4096,
                  "Threads; 0 is one for each processor that the process may use");
}

void add_state_dtype(const Command& command, CommonOptions& options) {
  command.choice("--state-dtype", options.state_dtype, {"f32", "bf16", "f16"},
                 "Type that SSM states are kept as between steps; of 16 bits they are rounded after each");
}

void add_texts(const Command& command, std::vector<std::string>& paths) {
  command
      .texts("--data", paths, "FILE", true,
             "Text files, and JSONL files (.jsonl) with a \"text\" in each line")
      .required()
      .not_empty();
}

void add_machine(const Command& command, CommonOptions& options) {
  command.text("--device", options.device, "DEVICE",
               "Where to run: cpu, cuda, cuda:N, or auto, a GPU where there is one");
  add_threads(command, options);
  command.flag("--reference", options.reference, "The slow, readable path of every operator");
  command.flag("--profile", options.profile, "Report the time that each kernel took on a GPU");
}

void add_common(const Command& command, CommonOptions& options) {
  command.choice("--dtype", options.dtype, {"auto", "f32", "bf16", "f16"},
                 "Type of the weight matrices; auto keeps the file's");
  add_machine(command, options);
  add_messages(command, options);
}

namespace {

Device device_of(const CommonOptions& options) {
  if (options.reference && options.device == "auto") return {};  // the reference paths are the CPU's
  try {
    return parse_device(options.device);
  } catch (const Error& error) {
    throw UsageError(concat("--device: ", error.what()));
  }
}

}  // namespace

ContextOptions context_options(const CommonOptions& options) {
  ContextOptions context;
  context.device = device_of(options);
  if (options.profile && context.device.kind == Device::Kind::cpu)
    throw UsageError("--profile measures kernels of a GPU, but the device is cpu");
  context.profile = options.profile;
  context.threads = options.threads;
  context.reference = options.reference;
  context.cancelled = interrupted;
  context.log = [quiet = options.quiet, verbose = options.verbose](LogLevel level, std::string_view text) {
    if (level == LogLevel::warning && !quiet) message(concat("warning: ", text));
    if (level != LogLevel::warning && verbose) message(text);
  };
  return context;
}

void report_profile(const Context& ctx) {
  const std::vector<KernelTime> times = ctx.profile();
  double total = 0.0;
  for (const KernelTime& t : times) total += t.seconds;
  for (const KernelTime& t : times) {
    std::ostringstream line;
    line << std::fixed << std::setprecision(3) << std::setw(12) << 1e3 * t.seconds << " ms "
         << std::setprecision(1) << std::setw(5) << 100.0 * t.seconds / total << " %  " << std::setw(8)
         << t.count << "  " << t.name;
    message(line.str());
  }
}

LoadOptions load_options(const CommonOptions& options) { return {.dtype = parse_dtype(options.dtype)}; }

DType state_dtype_of(const CommonOptions& options) {
  return parse_dtype(options.state_dtype).value_or(DType::f32);
}

}  // namespace krait::cli
