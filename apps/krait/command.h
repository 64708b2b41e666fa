// Commands and their options. A cover over CLI11, which takes long to compile and so is included in
// command.cc alone, and which gives all options one style of declaration, help and messages.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace krait::cli {

// A command line that was not understood.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A declared option.
class Option {
 public:
  explicit Option(CLI::Option* option) : option_(option) {}
  Option required() const;
  // May only be given together with `other`, or only without it.
  Option needs(Option other) const;
  Option excludes(Option other) const;
  // Its value may not be the empty text.
  Option not_empty() const;
  // Shown as its default, where that is not the value's own text.
  Option shows_default(const std::string& text) const;
  // It stood on the command line that was parsed.
  [[nodiscard]] bool given() const;

 private:
  friend class Command;
  CLI::Option* option_;
};

// What a command and its options look like, for what is generated from them.
struct OptionEntry {
  std::string long_name;   // without dashes; empty for a positional
  std::string short_name;  // without dash; may be empty
  std::string type;        // "N", "FILE", "auto|cpu"; empty for a flag
  std::string description;
  std::string default_value;

  [[nodiscard]] bool positional() const { return long_name.empty(); }
  // Of a type such as "auto|cpu"; else empty.
  [[nodiscard]] std::vector<std::string> choices() const;
};

struct CommandEntry {
  std::string path;  // "generate", "bench op"; empty for the program itself
  std::string description;
  std::vector<OptionEntry> options;
  std::vector<std::string> below;  // names of its subcommands
};

// Options are named as in "--model,-m"; a name without dashes is a positional. Values are written when the
// command line is parsed, and what they hold before is the default.
class Command {
 public:
  explicit Command(CLI::App* app) : app_(app) {}

  [[nodiscard]] Command add_command(const std::string& name, const std::string& description) const;
  // Is not listed anywhere.
  void hide() const;
  // Runs after parsing, unless one of its own subcommands was called.
  void on_run(const std::function<void()>& body) const;
  // Follows the options in --help.
  void epilogue(const std::string& text) const;

  Option flag(const std::string& name, bool& value, const std::string& description) const;
  Option text(const std::string& name, std::string& value, const std::string& type,
              const std::string& description) const;
  // May be given several times; with `greedy` one option takes several words.
  Option texts(const std::string& name, std::vector<std::string>& values, const std::string& type,
               bool greedy, const std::string& description) const;
  // One of `choices`.
  Option choice(const std::string& name, std::string& value, const std::vector<std::string>& choices,
                const std::string& description) const;
  // Numbers within bounds, both included; NaN is outside of all.
  Option integer(const std::string& name, int& value, int minimum, int maximum,
                 const std::string& description) const;
  Option integer(const std::string& name, std::int64_t& value, std::int64_t minimum, std::int64_t maximum,
                 const std::string& description) const;
  Option integer(const std::string& name, std::optional<std::uint64_t>& value,
                 const std::string& description) const;
  Option number(const std::string& name, double& value, double minimum, double maximum,
                const std::string& description) const;

  // Exactly one of them must be given.
  void require_one(const std::vector<Option>& options) const;

  // This command and all below it, hidden ones left out.
  [[nodiscard]] std::vector<CommandEntry> table() const;

 private:
  CLI::App* app_;
};

// The whole program: a command that is given a command line.
class Program {
 public:
  Program(const std::string& name, const std::string& description,
          const std::function<std::string()>& version);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  [[nodiscard]] Command command() const { return Command(app_.get()); }
  // Parses and runs, or prints help. Throws UsageError with a line that says where help is.
  void run(int argc, const char* const* argv);

 private:
  std::unique_ptr<CLI::App> app_;
};

}  // namespace krait::cli
