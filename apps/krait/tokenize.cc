// krait tokenize: text to token ids and back.
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "input.h"
#include "krait/core/error.h"
#include "krait/tokenizer/tokenizer.h"
#include "options.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  CommonOptions common;
  std::string tokenizer;
  bool jsonl = false;
  bool skip_special = false;
};

// {"text": ...} -> {"ids": [...]}, {"ids": [...]} -> {"text": ...}
nlohmann::json convert(const Tokenizer& tokenizer, const nlohmann::json& line, bool skip_special) {
  if (line.is_object() && line.size() == 1) {
    if (const auto text = line.find("text"); text != line.end() && text->is_string())
      return {{"ids", tokenizer.encode(text->get_ref<const std::string&>())}};
    if (const auto ids = line.find("ids"); ids != line.end() && ids->is_array()) {
      for (const auto& id : *ids) require(id.is_number_integer(), "id ", id.dump(), " is not an integer");
      return {{"text", tokenizer.decode(ids->get<std::vector<std::int64_t>>(), skip_special)}};
    }
  }
  fail(ErrorKind::invalid_argument, "expected {\"text\": \"...\"} or {\"ids\": [...]}");
}

void convert_lines(const Tokenizer& tokenizer, bool skip_special) {
  std::int64_t number = 0;
  for (std::string line; std::getline(std::cin, line) && !interrupted();) {
    ++number;
    try {
      print(convert(tokenizer, nlohmann::json::parse(line), skip_special).dump() + "\n");
    } catch (const nlohmann::json::exception&) {
      fail(ErrorKind::invalid_argument, "standard input, line ", number, ": is not JSON");
    } catch (const Error& error) {
      fail(error.kind(), "standard input, line ", number, ": ", error.what());
    }
  }
}

void run(const Options& options) {
  const Tokenizer tokenizer = options.tokenizer.empty() ? load_tokenizer(open_checkpoint(options.common))
                                                        : Tokenizer::from_file(options.tokenizer);
  if (options.jsonl) return convert_lines(tokenizer, options.skip_special);
  std::string line;
  for (const std::int64_t id : tokenizer.encode(read_text("-")))
    line += (line.empty() ? "" : " ") + std::to_string(id);
  print(line + "\n");
}

}  // namespace

void add_tokenize(const Command& program) {
  auto options = std::make_shared<Options>();
  const Command command = program.add_command(
      "tokenize", "Turn standard input into token ids; with --jsonl line by line, in both directions");
  const Option tokenizer =
      command.text("--tokenizer", options->tokenizer, "FILE", "A tokenizer.json").not_empty();
  add_model(command, options->common).excludes(tokenizer);
  command.flag("--jsonl", options->jsonl,
               "Lines {\"text\": ...} become {\"ids\": [...]}, and {\"ids\": [...]} become {\"text\": ...}");
  command.flag("--skip-special", options->skip_special, "Leave special tokens out of decoded text");
  add_messages(command, options->common);
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
