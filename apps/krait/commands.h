// The subcommands of krait. Each function adds one to the program's option table, in the file of its name;
// parsing the command line then runs it.
#pragma once

namespace CLI {
class App;
}

namespace krait::cli {

void add_generate(CLI::App& app);
void add_logits(CLI::App& app);
void add_score(CLI::App& app);
void add_bench(CLI::App& app);
void add_info(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_download(CLI::App& app);
// Hidden: writes the man page and the shell completions, from the option tables of all of `app`.
void add_man(CLI::App& app);
void add_completion(CLI::App& app);

}  // namespace krait::cli
