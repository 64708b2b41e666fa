#include "help_pages.h"
#include "krait/core/error.h"

namespace krait::cli {
namespace {

// Text as roff takes it: a dash is a minus that can be searched for and copied, and no line becomes a
// request.
std::string roff(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '\\')
      out += "\\e";
    else if (c == '-')
      out += "\\-";
    else
      out += c;
  }
  if (out.starts_with('.') || out.starts_with('\'')) out.insert(0, "\\&");
  return out;
}

std::string option_names(const OptionEntry& option) {
  std::string names;
  if (option.positional()) return "\\fI" + roff(option.type) + "\\fR";
  if (!option.short_name.empty()) names = "\\fB\\-" + option.short_name + "\\fR, ";
  names += "\\fB\\-\\-" + roff(option.long_name) + "\\fR";
  if (!option.type.empty()) names += " \\fI" + roff(option.type) + "\\fR";
  return names;
}

std::string options_section(const CommandEntry& command) {
  std::string out;
  for (const OptionEntry& option : command.options) {
    out += ".TP\n" + option_names(option) + "\n" + roff(option.description);
    if (!option.default_value.empty()) out += roff(" (default " + option.default_value + ")");
    out += "\n";
  }
  return out;
}

}  // namespace

std::string man_page(const Command& program) {
  const std::vector<CommandEntry> commands = program.table();
  std::string out = concat(".TH KRAIT 1 \"\" \"krait ", KRAIT_VERSION, "\" \"User Commands\"\n");
  out += ".SH NAME\nkrait \\- run Mamba language models\n";
  out += ".SH SYNOPSIS\n\\fBkrait\\fR \\fIcommand\\fR [\\fIoption\\fR]...\n";
  out += ".SH DESCRIPTION\n" + roff(commands[0].description) + "\n";
  out += ".SH OPTIONS\n" + options_section(commands[0]);
  out += ".SH COMMANDS\n";
  for (const CommandEntry& command : commands) {
    if (command.path.empty()) continue;
    out += ".SS krait " + roff(command.path) + "\n" + roff(command.description) + ".\n" +
           options_section(command);
  }
  out +=
      ".SH ENVIRONMENT\n"
      "Models are kept in the cache that huggingface_hub uses, and the same variables are honoured:\n"
      ".BR HF_HOME ,\n.BR HF_HUB_CACHE ,\n.BR HF_ENDPOINT ,\n.BR HF_TOKEN ,\n.BR HF_HUB_OFFLINE .\n"
      ".SH EXIT STATUS\n"
      "0 done; 1 an error of input, files or network; 2 a command line that was not understood; "
      "130 interrupted, after writing what there was.\n"
      ".SH EXAMPLES\n"
      ".nf\n"
      "krait generate \\-\\-prompt \"ROMEO:\"\n"
      "krait generate \\-\\-model state\\-spaces/mamba\\-130m \\-\\-prompt \"Mamba is\" \\-\\-temperature 0\n"
      "krait score \\-\\-text book.txt \\-\\-json\n"
      "krait eval \\-\\-model state\\-spaces/mamba\\-130m \\-\\-tasks tasks/\n"
      ".fi\n";
  return out;
}

}  // namespace krait::cli
