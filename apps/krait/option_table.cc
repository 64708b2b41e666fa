#include "option_table.h"

#include <CLI/CLI.hpp>

namespace krait::cli {
namespace {

bool is_group(const CLI::App& app) { return app.get_name().empty(); }
bool is_hidden(const CLI::App& app) { return app.get_group().empty(); }

std::vector<const CLI::App*> below(const CLI::App& app) {
  return app.get_subcommands(std::function<bool(const CLI::App*)>{});
}

OptionEntry entry_of(const CLI::Option& option) {
  OptionEntry entry;
  if (!option.get_lnames().empty()) entry.long_name = option.get_lnames().front();
  if (!option.get_snames().empty()) entry.short_name = option.get_snames().front();
  if (option.get_items_expected_max() > 0) entry.type = option.get_type_name();
  entry.description = option.get_description();
  entry.default_value = option.get_default_str();
  entry.required = option.get_required();
  return entry;
}

// The options of a command, those in groups included.
void collect_options(const CLI::App& app, std::vector<OptionEntry>& entries) {
  for (const CLI::Option* option : app.get_options())
    if (!option->get_group().empty()) entries.push_back(entry_of(*option));
  for (const CLI::App* group : below(app))
    if (is_group(*group)) collect_options(*group, entries);
}

void collect_commands(const CLI::App& app, const std::string& path, std::vector<CommandEntry>& commands) {
  CommandEntry entry{.path = path, .description = app.get_description(), .options = {}, .below = {}};
  collect_options(app, entry.options);
  const std::size_t place = commands.size();
  commands.push_back(std::move(entry));
  for (const CLI::App* sub : below(app)) {
    if (is_group(*sub) || is_hidden(*sub)) continue;
    commands[place].below.push_back(sub->get_name());
    collect_commands(*sub, path.empty() ? sub->get_name() : path + " " + sub->get_name(), commands);
  }
}

}  // namespace

std::vector<std::string> OptionEntry::choices() const {
  std::vector<std::string> names;
  if (type.find('|') != std::string::npos) names = CLI::detail::split(type, '|');
  return names;
}

std::vector<CommandEntry> option_table(const CLI::App& app) {
  std::vector<CommandEntry> commands;
  collect_commands(app, "", commands);
  return commands;
}

}  // namespace krait::cli
