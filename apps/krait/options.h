// Options that subcommands share, and helpers with which all options are declared in one style.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "krait/core/context.h"
#include "krait/models/load.h"

namespace krait::cli {

struct CommonOptions {
  std::string model;  // empty: the bundled model
  std::string device = "auto";
  std::string dtype = "auto";
  int threads = 0;
  bool reference = false;
  bool quiet = false;
  bool verbose = false;
};

// --quiet and --verbose.
void add_messages(CLI::App& command, CommonOptions& options);
// --device, --dtype, --threads, --reference, --quiet and --verbose.
void add_common(CLI::App& command, CommonOptions& options);
// --model
CLI::Option* add_model(CLI::App& command, CommonOptions& options);

// One of `choices`; the first is the default.
CLI::Option* add_choice(CLI::App& command, const std::string& name, std::string& value,
                        const std::vector<std::string>& choices, const std::string& description);

// Numbers within bounds, both included. A message names the option, what was found and what was expected.
CLI::Option* add_integer(CLI::App& command, const std::string& name, int& value, int minimum, int maximum,
                         const std::string& description);
CLI::Option* add_integer(CLI::App& command, const std::string& name, std::int64_t& value,
                         std::int64_t minimum, std::int64_t maximum, const std::string& description);
CLI::Option* add_number(CLI::App& command, const std::string& name, double& value, double minimum,
                        double maximum, const std::string& description);

// Any 64-bit seed.
CLI::Option* add_seed(CLI::App& command, const std::string& name, std::optional<std::uint64_t>& value,
                      const std::string& description);

// Exactly one of `options` must be given.
void require_one(CLI::App& command, const std::vector<CLI::Option*>& options);

// A file that has to be there, and one that will be written.
CLI::Option* add_input_file(CLI::App& command, const std::string& name, std::string& value,
                            const std::string& description);
CLI::Option* add_output_file(CLI::App& command, const std::string& name, std::string& value,
                             const std::string& description);

// Warnings go to stderr unless --quiet, everything else with --verbose; Ctrl-C asks the library to stop.
ContextOptions context_options(const CommonOptions& options);
LoadOptions load_options(const CommonOptions& options);

}  // namespace krait::cli
