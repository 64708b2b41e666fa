#include <memory>

#include "commands.h"
#include "help_pages.h"
#include "terminal.h"

namespace krait::cli {
namespace {

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

// The text between single quotes of a shell. bash and zsh end the quotes, fish escapes within them.
std::string quoted(const std::string& text, const std::string& quote) {
  std::string out = "'";
  for (const char c : text) {
    if (c == '\'')
      out += quote;
    else
      out += c;
  }
  return out + "'";
}

// Everything that may be typed after a command.
std::vector<std::string> words_of(const CommandEntry& command) {
  std::vector<std::string> words = command.below;
  for (const OptionEntry& option : command.options)
    if (!option.positional()) words.push_back("--" + option.long_name);
  return words;
}

// zsh: one argument of _arguments. Colons and brackets separate its parts.
std::string zsh_argument(const OptionEntry& option) {
  std::string description;
  for (const char c : option.description) {
    if (c == ':' || c == '[' || c == ']') description += '\\';
    description += c;
  }
  if (option.positional()) return quoted(":" + option.type + ":_files", "'\\''");
  std::string argument = "--" + option.long_name + "[" + description + "]";
  if (!option.choices().empty())
    argument += ":choice:(" + joined(option.choices()) + ")";
  else if (!option.type.empty())
    argument += ":" + option.type + ":_files";
  return quoted(argument, "'\\''");
}

}  // namespace

std::string bash_completion(const Command& program) {
  const auto commands = program.table();
  std::string paths;
  std::string choices;
  std::string words;
  for (const CommandEntry& command : commands) {
    for (const std::string& name : command.below)
      paths += (paths.empty() ? "" : "|") + quoted(command.path + " " + name, "");
    for (const OptionEntry& option : command.options)
      if (!option.choices().empty())
        choices += "    " + quoted(command.path + " --" + option.long_name, "") + ") words='" +
                   joined(option.choices()) + "' ;;\n";
    words += "      " + quoted(command.path, "") + ") words='" + joined(words_of(command)) + "' ;;\n";
  }
  return "# bash completion for krait\n"
         "_krait() {\n"
         "  local current=${COMP_WORDS[COMP_CWORD]} command= words= word\n"
         "  for word in \"${COMP_WORDS[@]:1:COMP_CWORD-1}\"; do\n"
         "    case \"$command $word\" in\n"
         "      " +
         paths +
         ") command=\"${command:+$command }$word\" ;;\n"
         "    esac\n"
         "  done\n"
         "  case \"$command ${COMP_WORDS[COMP_CWORD-1]}\" in\n" +
         choices + "    *) case $command in\n" + words +
         "    esac ;;\n"
         "  esac\n"
         "  mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$current\")\n"
         "}\n"
         "complete -o default -F _krait krait\n";
}

std::string zsh_completion(const Command& program) {
  const auto commands = program.table();
  std::string names;
  std::string cases;
  for (const CommandEntry& command : commands) {
    if (command.path.empty() || command.path.find(' ') != std::string::npos) continue;
    names += "    " + quoted(command.path + ":" + command.description, "'\\''") + "\n";
    cases += "        " + command.path + ")\n          _arguments";
    if (!command.below.empty()) cases += " \\\n            '1:command:(" + joined(command.below) + ")'";
    // What stands two levels down is offered together with the level above it.
    for (const CommandEntry& other : commands)
      if (other.path == command.path || other.path.starts_with(command.path + " "))
        for (const OptionEntry& option : other.options) cases += " \\\n            " + zsh_argument(option);
    cases += " ;;\n";
  }
  std::string general;
  for (const OptionEntry& option : commands[0].options) general += " " + zsh_argument(option);
  return "#compdef krait\n"
         "_krait() {\n"
         "  local curcontext=$curcontext state line\n"
         "  local -a commands=(\n" +
         names +
         "  )\n"
         "  _arguments -C" +
         general +
         " '1: :->command' '*:: :->argument'\n"
         "  case $state in\n"
         "    command) _describe command commands ;;\n"
         "    argument)\n"
         "      case $line[1] in\n" +
         cases +
         "      esac ;;\n"
         "  esac\n"
         "}\n"
         "_krait \"$@\"\n";
}

std::string fish_completion(const Command& program) {
  const auto commands = program.table();
  std::string out = "# fish completion for krait\n";
  for (const CommandEntry& command : commands) {
    const std::string leaf = command.path.substr(command.path.rfind(' ') + 1);
    const std::string where =
        command.path.empty() ? "__fish_use_subcommand" : "__fish_seen_subcommand_from " + leaf;
    for (const CommandEntry& sub : commands) {
      if (sub.path.empty() || sub.path == command.path) continue;
      const std::size_t cut = sub.path.rfind(' ');
      if ((cut == std::string::npos ? "" : sub.path.substr(0, cut)) != command.path) continue;
      out += "complete -c krait -n '" + where + "' -f -a " + sub.path.substr(cut + 1) + " -d " +
             quoted(sub.description, "\\'") + "\n";
    }
    for (const OptionEntry& option : command.options) {
      if (option.positional()) continue;
      out += "complete -c krait -n '" + where + "' -l " + option.long_name;
      if (!option.short_name.empty()) out += " -s " + option.short_name;
      if (!option.choices().empty()) out += " -x -a '" + joined(option.choices()) + "'";
      if (option.choices().empty() && !option.type.empty()) out += " -r";
      out += " -d " + quoted(option.description, "\\'") + "\n";
    }
  }
  return out;
}

void add_completion(const Command& program) {
  auto shell = std::make_shared<std::string>();
  const Command command = program.add_command("completion", "Write a shell completion script");
  command.hide();
  command.choice("shell", *shell, {"bash", "zsh", "fish"}, "The shell").required();
  command.on_run([shell, program] {
    print(*shell == "bash"  ? bash_completion(program)
          : *shell == "zsh" ? zsh_completion(program)
                            : fish_completion(program));
  });
}

void add_man(const Command& program) {
  const Command command = program.add_command("man", "Write the man page");
  command.hide();
  command.on_run([program] { print(man_page(program)); });
}

}  // namespace krait::cli
