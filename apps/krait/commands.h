// The subcommands of krait. Each function adds one to the program's option table, in the file of its name;
// parsing the command line then runs it.
#pragma once

#include "command.h"

namespace krait::cli {

void add_generate(const Command& program);
void add_logits(const Command& program);
void add_score(const Command& program);
void add_eval(const Command& program);
void add_train(const Command& program);
void add_bench(const Command& program);
void add_info(const Command& program);
void add_report(const Command& program);
void add_tokenize(const Command& program);
void add_download(const Command& program);
void add_tokenizer(const Command& program);
void add_data(const Command& program);
void add_convert(const Command& program);
// Hidden: writes the man page and the shell completions, from the option tables of `program`.
void add_man(const Command& program);
void add_completion(const Command& program);

}  // namespace krait::cli
