#include "options.h"

#include <limits>

#include "krait/core/error.h"
#include "terminal.h"

namespace krait::cli {
namespace {

// CLI11's own Range lets NaN pass and does not say which type it wants.
template <typename T>
CLI::Validator bounds(T minimum, T maximum) {
  return CLI::Validator(
      [minimum, maximum](const std::string& text) {
        T value{};
        // CLI11 reads a negative number as a large unsigned one.
        const bool negative = std::is_unsigned_v<T> && text.starts_with('-');
        if (!negative && CLI::detail::lexical_cast(text, value) && value >= minimum && value <= maximum)
          return std::string();
        std::string expected = std::is_integral_v<T> ? "an integer" : "a number";
        expected += concat(" of at least ", minimum);
        if (maximum != std::numeric_limits<T>::max()) expected += concat(" and at most ", maximum);
        return concat("found '", text, "', expected ", expected);
      },
      "");
}

template <typename T>
CLI::Option* add_bounded(CLI::App& command, const std::string& name, T& value, T minimum, T maximum,
                         const char* type, const std::string& description) {
  return command.add_option(name, value, description)
      ->check(bounds(minimum, maximum))
      ->type_name(type)
      ->capture_default_str();
}

}  // namespace

CLI::Option* add_choice(CLI::App& command, const std::string& name, std::string& value,
                        const std::vector<std::string>& choices, const std::string& description) {
  const std::string type = CLI::detail::join(choices, "|");
  return command.add_option(name, value, description)
      ->check(CLI::Validator(
          [choices, type](const std::string& text) {
            for (const std::string& choice : choices)
              if (text == choice) return std::string();
            return concat("found '", text, "', expected ", type);
          },
          ""))
      ->type_name(type)
      ->capture_default_str();
}

CLI::Option* add_integer(CLI::App& command, const std::string& name, int& value, int minimum, int maximum,
                         const std::string& description) {
  return add_bounded(command, name, value, minimum, maximum, "N", description);
}

CLI::Option* add_integer(CLI::App& command, const std::string& name, std::int64_t& value,
                         std::int64_t minimum, std::int64_t maximum, const std::string& description) {
  return add_bounded(command, name, value, minimum, maximum, "N", description);
}

CLI::Option* add_number(CLI::App& command, const std::string& name, double& value, double minimum,
                        double maximum, const std::string& description) {
  return add_bounded(command, name, value, minimum, maximum, "X", description);
}

CLI::Option* add_seed(CLI::App& command, const std::string& name, std::optional<std::uint64_t>& value,
                      const std::string& description) {
  return command.add_option(name, value, description)
      ->check(bounds<std::uint64_t>(0, std::numeric_limits<std::uint64_t>::max()))
      ->type_name("N");
}

void require_one(CLI::App& command, const std::vector<CLI::Option*>& options) {
  for (CLI::Option* option : options)
    for (CLI::Option* other : options)
      if (option != other) option->excludes(other);
  command.parse_complete_callback([options] {
    std::string names;
    for (const CLI::Option* option : options) {
      if (option->count() > 0) return;
      names += (names.empty() ? "" : ", ") + option->get_name();
    }
    throw CLI::RequiredError("One of " + names);
  });
}

CLI::Option* add_input_file(CLI::App& command, const std::string& name, std::string& value,
                            const std::string& description) {
  return command.add_option(name, value, description)->type_name("FILE");
}

CLI::Option* add_output_file(CLI::App& command, const std::string& name, std::string& value,
                             const std::string& description) {
  return command.add_option(name, value, description)->type_name("FILE");
}

CLI::Option* add_model(CLI::App& command, CommonOptions& options) {
  return command
      .add_option("--model,-m", options.model,
                  "Directory of a checkpoint, or name of one on the hub (org/name[@revision]); "
                  "the bundled model where left out")
      ->check(CLI::Validator(
          [](const std::string& text) {
            return text.empty() ? std::string("is empty, expected a directory or a name on the hub")
                                : std::string();
          },
          ""))
      ->type_name("MODEL");
}

void add_messages(CLI::App& command, CommonOptions& options) {
  auto* quiet = command.add_flag("--quiet,-q", options.quiet, "No progress and no warnings");
  command.add_flag("--verbose,-v", options.verbose, "Say what is done, and how fast")->excludes(quiet);
}

void add_common(CLI::App& command, CommonOptions& options) {
  add_choice(command, "--device", options.device, {"auto", "cpu"}, "Where to run");
  add_choice(command, "--dtype", options.dtype, {"auto", "f32", "bf16", "f16"},
             "Type of the weight matrices; auto keeps the file's");
  add_integer(command, "--threads", options.threads, 0, 4096,
              "Threads; 0 is one for each processor that the process may use");
  command.add_flag("--reference", options.reference, "The slow, readable path of every operator");
  add_messages(command, options);
}

ContextOptions context_options(const CommonOptions& options) {
  ContextOptions context;
  context.threads = options.threads;
  context.reference = options.reference;
  context.cancelled = interrupted;
  context.log = [quiet = options.quiet, verbose = options.verbose](LogLevel level, std::string_view text) {
    if (level == LogLevel::warning && !quiet) message(concat("warning: ", text));
    if (level != LogLevel::warning && verbose) message(text);
  };
  return context;
}

LoadOptions load_options(const CommonOptions& options) { return {.dtype = parse_dtype(options.dtype)}; }

}  // namespace krait::cli
