// The man page and the shell completions, written from the option tables: they cannot fall behind.
#pragma once

#include <string>

namespace CLI {
class App;
}

namespace krait::cli {

// In roff, for man(1).
std::string man_page(const CLI::App& app);

std::string bash_completion(const CLI::App& app);
std::string zsh_completion(const CLI::App& app);
std::string fish_completion(const CLI::App& app);

}  // namespace krait::cli
