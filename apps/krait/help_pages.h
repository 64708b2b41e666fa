// The man page and the shell completions, written from the option tables: they cannot fall behind.
#pragma once

#include <string>

#include "command.h"

namespace krait::cli {

// In roff, for man(1).
std::string man_page(const Command& program);

std::string bash_completion(const Command& program);
std::string zsh_completion(const Command& program);
std::string fish_completion(const Command& program);

}  // namespace krait::cli
