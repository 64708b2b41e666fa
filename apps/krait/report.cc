// krait report: a training run as one page of HTML.
#include "train/report.h"

#include <filesystem>
#include <memory>
#include <string>

#include "commands.h"
#include "krait/core/error.h"
#include "krait/io/atomic_file.h"
#include "terminal.h"

namespace krait::cli {
namespace {

struct Options {
  std::string directory;
  std::string out;
  bool quiet = false;
};

void run(const Options& options) {
  const std::filesystem::path directory(options.directory);
  const std::filesystem::path out =
      options.out.empty() ? directory / "report.html" : std::filesystem::path(options.out);
  io::write_file(out, report::render(report::read_run_log(directory)));
  if (!options.quiet) print(concat(out.string(), "\n"));
}

}  // namespace

void add_report(const Command& program) {
  auto options = std::make_shared<Options>();
  const Command command =
      program.add_command("report", "Write a page of HTML about a training run: curves, settings, samples");
  command.text("directory", options->directory, "DIR", "Directory of the run, which may be under way")
      .required()
      .not_empty();
  command.text("--out", options->out, "FILE", "Where to write it; DIR/report.html where left out")
      .not_empty();
  command.flag("--quiet,-q", options->quiet, "Do not print the name of the page");
  command.on_run([options] { run(*options); });
}

}  // namespace krait::cli
