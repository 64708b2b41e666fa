#include "command.h"

#include <CLI/CLI.hpp>
#include <limits>
#include <sstream>

#include "krait/core/error.h"

namespace krait::cli {
namespace {

// CLI11's own Range lets NaN pass and does not say which type it wants.
template <typename T>
CLI::Validator within(T minimum, T maximum) {
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
Option bounded(CLI::App& app, const std::string& name, T& value, T minimum, T maximum, const char* type,
               const std::string& description) {
  CLI::Option* option =
      app.add_option(name, value, description)->check(within(minimum, maximum))->type_name(type);
  if (value >= minimum && value <= maximum) option->capture_default_str();  // else it stands for "not given"
  return Option(option);
}

// Breaks lines between words.
std::string wrapped(const std::string& text, std::size_t width) {
  std::string out;
  std::size_t column = 0;
  std::istringstream words(text);
  for (std::string word; words >> word; column += word.size()) {
    if (column > 0 && column + 1 + word.size() > width) {
      out += '\n';
      column = 0;
    } else if (column > 0) {
      out += ' ';
      ++column;
    }
    out += word;
  }
  return out;
}

// Names and type on the left, description and default on the right.
class HelpFormatter : public CLI::Formatter {
 public:
  static constexpr std::size_t kLeft = 32;
  static constexpr std::size_t kRight = 68;

  HelpFormatter() { column_width(kLeft); }

  std::string make_option_opts(const CLI::Option* option) const override {
    return option->get_type_name().empty() ? "" : " " + option->get_type_name();
  }
  std::string make_option_desc(const CLI::Option* option) const override {
    const std::string value = option->get_default_str();
    return wrapped(option->get_description() + (value.empty() ? "" : " (default " + value + ")"), kRight);
  }
  std::string make_subcommand(const CLI::App* command) const override {
    std::stringstream out;
    CLI::detail::format_help(out, command->get_name(), wrapped(command->get_description(), kRight), kLeft);
    return out.str();
  }
};

// The innermost subcommand that was being parsed.
const CLI::App& parsed(const CLI::App& app) {
  const auto below = app.get_subcommands();
  return below.empty() ? app : parsed(*below.front());
}

// Of an option that was given more often than it takes values; CLI11 says "At Most 1 required but received
// 2".
std::string describe(const CLI::ArgumentMismatch& error, const CLI::App& app) {
  for (const CLI::Option* option : app.get_options())
    if (option->get_items_expected_max() == 1 && option->count() > 1)
      return concat(option->get_name(), ": given ", option->count(), " times, expected once");
  return error.what();
}

std::string full_name(const CLI::App& app) {
  return app.get_parent() == nullptr ? app.get_name() : full_name(*app.get_parent()) + " " + app.get_name();
}

OptionEntry entry_of(const CLI::Option& option) {
  OptionEntry entry;
  if (!option.get_lnames().empty()) entry.long_name = option.get_lnames().front();
  if (!option.get_snames().empty()) entry.short_name = option.get_snames().front();
  if (option.get_items_expected_max() > 0) entry.type = option.get_type_name();
  entry.description = option.get_description();
  entry.default_value = option.get_default_str();
  return entry;
}

void collect(const CLI::App& app, const std::string& path, std::vector<CommandEntry>& commands) {
  CommandEntry entry{.path = path, .description = app.get_description(), .options = {}, .below = {}};
  for (const CLI::Option* option : app.get_options()) entry.options.push_back(entry_of(*option));
  const std::size_t place = commands.size();
  commands.push_back(std::move(entry));
  for (const CLI::App* below : app.get_subcommands(std::function<bool(const CLI::App*)>{})) {
    if (below->get_group().empty()) continue;
    commands[place].below.push_back(below->get_name());
    collect(*below, path.empty() ? below->get_name() : path + " " + below->get_name(), commands);
  }
}

}  // namespace

Option Option::required() const { return Option(option_->required()); }
Option Option::needs(Option other) const { return Option(option_->needs(other.option_)); }
Option Option::excludes(Option other) const { return Option(option_->excludes(other.option_)); }

Option Option::shows_default(const std::string& text) const { return Option(option_->default_str(text)); }
bool Option::given() const { return option_->count() > 0; }

Option Option::not_empty() const {
  return Option(option_->check(CLI::Validator(
      [](const std::string& text) {
        return text.empty() ? std::string("is empty, expected a value") : std::string();
      },
      "")));
}

std::vector<std::string> OptionEntry::choices() const {
  return type.find('|') == std::string::npos ? std::vector<std::string>() : CLI::detail::split(type, '|');
}

Command Command::add_command(const std::string& name, const std::string& description) const {
  return Command(app_->add_subcommand(name, description));
}

void Command::hide() const { app_->group(""); }
void Command::epilogue(const std::string& text) const { app_->footer(text); }

void Command::on_run(const std::function<void()>& body) const {
  app_->callback([app = app_, body] {
    if (app->get_subcommands().empty()) body();
  });
}

Option Command::flag(const std::string& name, bool& value, const std::string& description) const {
  return Option(app_->add_flag(name, value, description));
}

Option Command::text(const std::string& name, std::string& value, const std::string& type,
                     const std::string& description) const {
  return Option(app_->add_option(name, value, description)->type_name(type));
}

Option Command::texts(const std::string& name, std::vector<std::string>& values, const std::string& type,
                      bool greedy, const std::string& description) const {
  return Option(app_->add_option(name, values, description)->type_name(type)->allow_extra_args(greedy));
}

Option Command::choice(const std::string& name, std::string& value, const std::vector<std::string>& choices,
                       const std::string& description) const {
  const std::string type = CLI::detail::join(choices, "|");
  const auto check = [choices, type](const std::string& text) {
    for (const std::string& choice : choices)
      if (text == choice) return std::string();
    return concat("found '", text, "', expected ", type);
  };
  return Option(app_->add_option(name, value, description)
                    ->check(CLI::Validator(check, ""))
                    ->type_name(type)
                    ->capture_default_str());
}

Option Command::integer(const std::string& name, int& value, int minimum, int maximum,
                        const std::string& description) const {
  return bounded(*app_, name, value, minimum, maximum, "N", description);
}

Option Command::integer(const std::string& name, std::int64_t& value, std::int64_t minimum,
                        std::int64_t maximum, const std::string& description) const {
  return bounded(*app_, name, value, minimum, maximum, "N", description);
}

Option Command::integer(const std::string& name, std::optional<std::uint64_t>& value,
                        const std::string& description) const {
  return Option(app_->add_option(name, value, description)
                    ->check(within<std::uint64_t>(0, std::numeric_limits<std::uint64_t>::max()))
                    ->type_name("N"));
}

Option Command::number(const std::string& name, double& value, double minimum, double maximum,
                       const std::string& description) const {
  return bounded(*app_, name, value, minimum, maximum, "X", description);
}

void Command::require_one(const std::vector<Option>& options) const {
  for (const Option& option : options)
    for (const Option& other : options)
      if (option.option_ != other.option_) option.option_->excludes(other.option_);
  app_->parse_complete_callback([options] {
    std::string names;
    for (const Option& option : options) {
      if (option.option_->count() > 0) return;
      names += (names.empty() ? "" : ", ") + option.option_->get_name();
    }
    throw CLI::RequiredError("One of " + names);
  });
}

std::vector<CommandEntry> Command::table() const {
  std::vector<CommandEntry> commands;
  collect(*app_, "", commands);
  return commands;
}

Program::Program(const std::string& name, const std::string& description,
                 const std::function<std::string()>& version)
    : app_(std::make_unique<CLI::App>(description, name)) {
  app_->formatter(std::make_shared<HelpFormatter>());
  app_->set_version_flag("--version", version, "Version, compiler, processor and backends");
}

Program::~Program() = default;

void Program::run(int argc, const char* const* argv) {
  std::string problem;
  try {
    app_->parse(argc, argv);
    // CLI11's require_subcommand() would complain of the absence before it complains of an unknown one.
    if (!app_->get_subcommands().empty()) return;
    problem = "A subcommand is required";
  } catch (const CLI::Success& help) {
    app_->exit(help);
    return;
  } catch (const CLI::ArgumentMismatch& error) {
    problem = describe(error, parsed(*app_));
  } catch (const CLI::ParseError& error) {
    problem = error.what();
  } catch (const UsageError& error) {
    problem = error.what();
  }
  throw UsageError(concat(problem, " (see ", full_name(parsed(*app_)), " --help)"));
}

}  // namespace krait::cli
