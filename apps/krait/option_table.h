// The option tables of the program as plain data, for what is generated from them.
#pragma once

#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace krait::cli {

struct OptionEntry {
  std::string long_name;   // without dashes; empty for a positional
  std::string short_name;  // without dash; may be empty
  std::string type;        // "N", "FILE", "auto|cpu"; empty for a flag
  std::string description;
  std::string default_value;
  bool required = false;

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

// The program first, then its subcommands in order; hidden ones are left out.
std::vector<CommandEntry> option_table(const CLI::App& app);

}  // namespace krait::cli
