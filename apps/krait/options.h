// Options that subcommands share.
#pragma once

#include <string>
#include <vector>

#include "command.h"
#include "krait/core/context.h"
#include "krait/models/load.h"

namespace krait::cli {

struct CommonOptions {
  std::string model;  // empty: the bundled model
  std::string device = "auto";
  std::string dtype = "auto";
  std::string state_dtype = "f32";
  int threads = 0;
  bool reference = false;
  bool profile = false;
  bool quiet = false;
  bool verbose = false;
};

// Counts that are only bounded so that nothing overflows.
inline constexpr std::int64_t kMaxCount = std::int64_t{1} << 40;

// --quiet and --verbose.
void add_messages(const Command& command, CommonOptions& options);
// --threads
void add_threads(const Command& command, CommonOptions& options);
// --device, --threads, --reference and --profile.
void add_machine(const Command& command, CommonOptions& options);
// --device, --dtype, --threads, --reference, --profile, --quiet and --verbose.
void add_common(const Command& command, CommonOptions& options);
// --model
Option add_model(const Command& command, CommonOptions& options);
// --state-dtype
void add_state_dtype(const Command& command, CommonOptions& options);
// --data, required: text files and JSONL files.
void add_texts(const Command& command, std::vector<std::string>& paths);

// Warnings go to stderr unless --quiet, everything else with --verbose; Ctrl-C asks the library to stop.
ContextOptions context_options(const CommonOptions& options);
// With --profile: the time of each kernel, to stderr.
void report_profile(const Context& ctx);
LoadOptions load_options(const CommonOptions& options);
DType state_dtype_of(const CommonOptions& options);

}  // namespace krait::cli
